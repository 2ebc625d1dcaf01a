"""Killable processes that run verifiers and users' reward functions, each request with a deadline.

The pool is the project's own because a verdict has to depend on the completion alone, and completions are written by a
model that is rewarded for finding holes. Neither `multiprocessing.Pool`, nor `concurrent.futures`, nor
`pebble.ProcessPool` gives all of the following:

- Deadlines in processor time. sympy may compute for ever on a hostile answer, in C code that no signal handler
  interrupts, so the worker is killed. pebble kills after a timeout of wall-clock time; on a busy machine easy answers
  would miss it, and rewards would depend on the load. Here /proc tells how long a worker was on a processor, and how
  long it waited for one, which is not counted; another limit holds for the time that it sleeps.
- Warm forks. A worker that has imported the verifiers and used them once is forked in milliseconds from a process that
  has a single thread (`process.fork_server`), so that killing is cheap, and extra workers are forked while some are
  slow. `multiprocessing`'s fork server can preload modules too, but a pool of it has no deadline at all: a worker that
  is killed takes its request with it, and the caller waits for ever.
- No JAX. The fork server is a new interpreter (`python -m`), not a fork of the training process, whose JAX runs threads
  and holds the accelerator. It does not import the main script again, as `multiprocessing` does, sees no accelerator in
  its environment, and ends when its socket closes, whatever killed the training process.
- Confinement of each worker: limits on address space and processor time, no core files, no network unless
  `verifier.network` is true, no standard input, output to a file, a process group of its own, which is killed as a
  whole. It guards against honest code that hangs or leaks; it is no sandbox for hostile native code.
- Replies that are not trusted. They are JSON with a number that must match the request; a worker that writes anything
  else is replaced. Requests travel as pickles, from the training process to the worker only.
- Deaths with a cause. The request of a worker that died is tried again, by a worker forked after the death; if the
  worker was killed from outside, as by the kernel for want of memory, that says nothing about the request, and it is
  tried more often.
"""
