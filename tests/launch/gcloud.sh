#!/usr/bin/env bash
# A gcloud that plays one worker of a slice in the folder $WORKER: it copies there, and runs there what it is told to.
printf '%s\0' "$@" >>"$GCLOUD_LOG"
printf '\n' >>"$GCLOUD_LOG"
case " $* " in
  *" scp "*) cp -p "$5" "$WORKER/pspo_jax.tar.gz" ;;
  *"pip install"*) tar -C "$WORKER/pspo_jax" -xzf "$WORKER/pspo_jax.tar.gz" && rm "$WORKER/pspo_jax.tar.gz" ;;
  *" ssh "*) cd "$WORKER" && TPU_WORKER_ID=0 exec bash -c "${*: -1}" ;;
esac
