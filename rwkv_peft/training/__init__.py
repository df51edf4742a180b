"""Training: from a config to the files of a run.

**Settings.** `TrainConfig` is what a user may say. `choose.choose(config, facts)` fills in what was
left open, once, when the model's config, the device and the documents are known. `Settings` has a
value in every field, and a config of these values gives the same settings again.

**Step.** A `step.Step` does forward, loss and backward of a micro-batch, and gives the sums for the
log; the loop knows no gradients. The loss weights of an optimizer step are counted before its first
forward, and each micro-batch's loss sum is divided by that count: however a step is split, its
gradient is the same. What is minimised is cross-entropy and the L2Wrap penalty; what is logged is
cross-entropy alone.

**Run.** `loop.Run` holds all that changes from step to step. `Run.state_dict()` in a run with the
same settings goes on bit for bit as if the first had never stopped: the place in the data is one
integer, the learning rate follows from the step.

**Precision.** Frozen weights have the compute dtype (`--precision`). Trained tensors are stepped in
float32 and rounded to that dtype once a step; operator states, norm statistics, softmax and loss
sums are float32. Trained tensors of a 16-bit dtype are views of flat buffers (`flat`), so that a
step is a few launches for all of them. Float32 tensors are stepped as they are; one without a
gradient, such as a state that no row of the step begins with, does not move, while in a buffer that
has a gradient a tensor without one counts as zeros.

**Evaluation** (`validation`, `validator`) lays held-out documents out as those of training, so that
shapes are the same, and leaves weights, generators and the mode of the model as they were. What
later evaluations depend on, the list of the earlier ones, is in `Run.state_dict()`.

**A run's folder** (`proj_dir`) holds `config.yaml` (all settings), `train_log.txt`,
`loss_data.jsonl` (a `metrics.StepRecord` a line; the names that users plot stay), after epoch k
`rwkv-{k}.pth` (the merged model, the full model or the state) and `rwkv-{k}-adapter/` in peft's
format, `rwkv-best…` alike of the best evaluation, `val_data.jsonl` and `val_samples.jsonl` (a
`validation.Evaluation` or `Sample` a line), `merge_report.json` of the last merge, and in
`checkpoints/step-NNN/` what a run that was interrupted had learned. `folder` takes it before
anything is read, locks it while the run lasts, and refuses one that holds a run; nothing is written
before the first step is done.
"""
