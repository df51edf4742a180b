"""The language of what is said: English, or one that has a catalogue.

A message is written as `_("text with {names}").format(names=…)`, so that a catalogue may put the
names where its language has them. The catalogues are those of gettext: `rwkv_peft.po` is edited,
and `msgfmt` makes the `rwkv_peft.mo` beside it, which is read.
"""

import gettext
import locale
import os
import sys
from collections.abc import Mapping

from rwkv_peft.assets import LOCALES
from rwkv_peft.errors import ConfigError

LANGUAGES = ("en", "zh")
# environment variables that name a language, the first that is set
VARIABLES = ("LC_ALL", "LC_MESSAGES", "LANG")
_DOMAIN = "rwkv_peft"
_translation = gettext.NullTranslations()


def _(message: str) -> str:
    """A message in the language that was chosen."""
    return _translation.gettext(message)


def choose_language(name: str = "") -> None:
    """Takes a language for all that is said from now on.

    Args:
        name: of LANGUAGES, or as in zh_CN; that of the environment if empty.
    Raises:
        ConfigError: there is no catalogue of it.
    """
    global _translation
    code = name.replace("-", "_").partition("_")[0].lower() or find_language(os.environ)
    if code not in LANGUAGES:
        raise ConfigError(f"--lang {name}: allowed is {', '.join(LANGUAGES)}")
    _translation = gettext.translation(_DOMAIN, LOCALES, [code], fallback=True)


def find_language(environment: Mapping[str, str]) -> str:
    """The language of the environment, if it has a catalogue and the terminal its characters."""
    named = next((environment[n] for n in VARIABLES if environment.get(n)), "")
    if not named and sys.platform == "win32":
        named = locale.getlocale()[0] or ""
    code = "zh" if named.lower().startswith(("zh", "chinese")) else "en"
    try:
        "中".encode(getattr(sys.stderr, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return "en"
    return code
