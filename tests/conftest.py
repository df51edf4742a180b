import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.accelerator.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU, and PyTorch finds none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
