"""One training step, and the loop around it.

An update reads, from the step to the loss, in four files:

1. `step.py`: rewards become advantages (`assign_advantages`), the replay mixes the batch, and `_update` calls
   `optimize`.
2. `update.py`: `optimize` runs iterations and minibatches; `loss_gradient` adds up the gradients of microbatches, each
   by `microbatch_loss`.
3. `scoring.py`: groups become rows, rows become microbatches, and `microbatch_log_probs` runs the model on one, or
   `microbatch_divergence` of `distillation.py` the model and a teacher.
4. `losses/policy_loss.py`: `compute_loss` is the loss of a microbatch, with the ratios and surrogates of
   `losses/ratios.py`.

Around the step stand `algorithm.py` (the strategies that a config names), `optimizer.py` (optax chains), `metrics.py`,
`supervised.py` (training on demonstrations), `setup.py` and `compile.py` (everything but arrays, and the compiled
programs), `host_step.py` and `loop.py` (rollouts, rewards, checkpoints), and `resume.py`.
"""
