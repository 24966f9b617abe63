#!/usr/bin/env bash
# One host of a slice: tpu.sh copies the source tree to every host and calls this script there, on all of them at once.
#
#   bash host.sh COMMAND --flag=value ... [-- flags of launch.train]
#
# Everything lies in ~/datamux_pod: src (the code), venv, train.log, and the state of the trainer.
#
#   install --extras=tpu               the tree that this script lies in becomes src; makes venv and installs src into it
#   check   --chips=64 --hosts=16      fails unless jax sees all chips of the slice
#   mount   --bucket=NAME | --nfs=HOST:/SHARE   --mount=DIR
#   start   --workdir=DIR --hosts=16 [--restarts=3] [--pause=120] -- FLAGS
#                                      starts the trainer unless it runs; returns while it goes on
#   status                             one line: status=... host=...
#   stop    [--wait=600] [--kill]      asks the trainer to save and waits until it has ended

set -euo pipefail
# shellcheck source=launch/pod/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

HOME_DIR=$HOME/datamux_pod
LOCK=$HOME_DIR/lock   # Held by the supervisor and its trainer for as long as they live.
STATE=$HOME_DIR/state # running, waiting, finished, saved, stopped, refused, or failed CODE.
PIDS=$HOME_DIR/pids   # Of the supervisor and of its trainer.
LOG=$HOME_DIR/train.log
PYTHON=$HOME_DIR/venv/bin/python

extras=tpu
chips=
hosts=1
bucket=
nfs=
mount=
workdir=
restarts=3
pause=120 # Hosts notice that one of them is gone after jax's heartbeat timeout of 100 seconds.
wait=600
kill=

# Machines update themselves after they boot, and hold apt's lock meanwhile.
apt_get() { sudo DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 "$@"; }

runs() { [ -e "$LOCK" ] && ! (flock -n 9) 9>>"$LOCK"; }

install() {
  local found python
  matches extras '^[a-z]+(,[a-z]+)*$' "is no list of extras. Write names from setup.cfg with commas between them, for instance --extras=tpu."
  ! runs || give_up "The trainer runs on $(hostname), and its code is not replaced under it. Stop it first."
  if [ "$ROOT" != "$HOME_DIR/src" ]; then
    rm -rf "$HOME_DIR/old"
    [ ! -e "$HOME_DIR/src" ] || mv "$HOME_DIR/src" "$HOME_DIR/old"
    mv "$ROOT" "$HOME_DIR/src"
    rm -rf "$HOME_DIR/old"
  fi
  cd "$HOME_DIR/src"
  if [ ! -x "$PYTHON" ]; then
    found=$(new_enough || :)
    if [ -z "$found" ]; then
      apt_get update -q
      apt_get install -q -y python3-venv python3-pip
      found=$(new_enough || :)
    fi
    if [ -n "$found" ]; then
      "$found" -m venv "$HOME_DIR/venv"
    else
      # Ubuntu 22.04, which the TPU images are made of, has Python 3.10.
      python3 -m pip install --quiet --user uv
      python3 -m uv venv --quiet --seed --python=3.12 "$HOME_DIR/venv"
    fi
  fi
  "$PYTHON" -m pip install --quiet --disable-pip-version-check -e ".[$extras]"
  # jax asks for this on v5e and newer; it makes the TPU runtime start faster.
  sudo sh -c 'echo always >/sys/kernel/mm/transparent_hugepage/enabled' || :
  python=$("$PYTHON" -c 'import sys, jax; print(f"Python {sys.version.split()[0]}, jax {jax.__version__}")')
  echo "installed host=$(hostname) $python"
}

# The first Python that is new enough and can make virtual environments.
new_enough() {
  local python
  for python in python3.13 python3.12 python3.11 python3; do
    if "$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$python"
      return 0
    fi
  done
  return 1
}

check() {
  positive chips hosts
  ! runs || give_up "The trainer runs on $(hostname) and holds its chips, so they cannot be counted. Stop it first."
  timeout 900 "$PYTHON" - "$chips" "$hosts" <<'PYTHON' || give_up "jax does not see the whole slice on $(hostname); its message is above."
import sys

import jax

chips, hosts = map(int, sys.argv[1:])
if hosts > 1:
    jax.distributed.initialize()
seen = f"{jax.device_count()} {jax.default_backend()} devices on {jax.process_count()} hosts"
if (jax.device_count(), jax.process_count(), jax.default_backend()) != (chips, hosts, "tpu"):
    sys.exit(f"jax sees {seen}, but the slice has {chips} chips on {hosts} hosts.")
print(f"checked host={jax.process_index()} {seen}")
PYTHON
}

mount_it() {
  local source=$bucket$nfs probe
  require mount /mnt/pod
  if mountpoint -q "$mount"; then
    [ "$(findmnt -n -o SOURCE --target "$mount")" = "$source" ] ||
      give_up "$(findmnt -n -o SOURCE --target "$mount") is mounted on $mount of $(hostname) already, and not $source. Choose another --mount."
  else
    sudo mkdir -p "$mount"
    if [ -n "$bucket" ]; then
      command -v gcsfuse >/dev/null || install_gcsfuse
      sudo chown "$(id -u):$(id -g)" "$mount"
      # Orbax writes a checkpoint under another name and then renames the folder, which buckets without folders of their own
      # do file by file. Metadata are not cached, as by default they are for ever on large machines: each host must see what
      # the others write.
      gcsfuse --implicit-dirs --rename-dir-limit=200000 --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
        "$bucket" "$mount"
    else
      command -v mount.nfs >/dev/null || { apt_get update -q && apt_get install -q -y nfs-common; }
      sudo mount -t nfs "$nfs" "$mount"
      [ -w "$mount" ] || sudo chmod a+rwxt "$mount" # A new Filestore share belongs to root.
    fi
  fi
  probe=$mount/.datamux_pod.$(hostname)
  { echo written >"$probe" && rm "$probe"; } ||
    give_up "$(hostname) cannot write to $mount. Give the service account of the machines the role roles/storage.objectUser on the bucket, or this user the right to write to the share."
  echo "mounted host=$(hostname) $source on $mount"
}

install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc
  curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -c -s) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  apt_get update -q
  apt_get install -q -y gcsfuse
}

# On several hosts, a workdir on the disk of one of them would be another folder on each.
check_shared() {
  local folder=$workdir kind
  while [ ! -e "$folder" ]; do folder=$(dirname "$folder"); done
  kind=$(stat -f -c %T "$folder")
  case $kind in
    ext2/ext3 | xfs | btrfs | zfs | tmpfs | ramfs | overlayfs)
      give_up "--workdir=$workdir is on a disk of $(hostname) itself ($kind), but all $hosts hosts must see the same folder. Mount a bucket or a share first, and give a folder on it."
      ;;
  esac
}

start() {
  local tries
  require workdir /mnt/pod/runs/muxbert
  absolute workdir
  positive hosts pause
  [[ $restarts =~ ^[0-9]{1,4}$ ]] || fail "--restarts=$restarts is no number of restarts. Write it in digits; 0 for none."
  check_train_flags
  [ -x "$PYTHON" ] || give_up "$(hostname) has no installation yet. Install first."
  [ "$hosts" -eq 1 ] || check_shared
  if runs; then
    status
    return
  fi
  rm -f "$STATE"
  # Nothing of the connection stays open, so that the trainer outlives it.
  setsid bash "$POD_DIR/host.sh" supervise --workdir="$workdir" --hosts="$hosts" --restarts="$restarts" --pause="$pause" \
    -- ${EXTRA[@]+"${EXTRA[@]}"} </dev/null >>"$LOG" 2>&1 &
  for ((tries = 0; tries < 100; tries++)); do
    [ ! -e "$STATE" ] || break
    sleep 0.1
  done
  status
}

supervise_here() {
  local code=0
  exec 9>>"$LOCK"
  flock -w 5 9 || give_up "The trainer runs already." # Who asks whether it runs holds the lock for a moment.
  rm -f "$HOME_DIR/stop"
  on_state() {
    echo "$$ $child" >"$PIDS"
    echo "$1" >"$STATE"
  }
  train_flags "$workdir" "$hosts"
  cd "$ROOT"
  export PYTHONUNBUFFERED=1
  echo "launch/pod: $(date -u '+%Y-%m-%d %H:%M:%S') UTC, host $(hostname): python -m launch.train $(quoted "${TRAIN[@]}")"
  supervise "$restarts" "$pause" "$PYTHON" -m launch.train "${TRAIN[@]}" || code=$?
  if [ "$code" -ne 0 ] && [ -e "$HOME_DIR/stop" ]; then
    echo stopped
  else
    case $code in
      0) echo finished ;;
      2) echo refused ;;
      130) echo saved ;;
      *) echo "failed $code" ;;
    esac
  fi >"$STATE"
}

status() {
  local state=idle
  [ ! -e "$STATE" ] || state=$(cat "$STATE")
  if runs; then
    case $state in running | waiting) ;; *) state=running ;; esac
  else
    # Whoever wrote that it runs is gone: the machine was started again, or the supervisor was killed.
    case $state in running | waiting) state=lost ;; esac
  fi
  echo "status=${state/ /-} host=$(hostname)"
}

ended_within() { (flock -w "$1" 9) 9>>"$LOCK"; }

stop() {
  local supervisor trainer
  positive wait
  if runs; then
    touch "$HOME_DIR/stop"
    read -r supervisor trainer <"$PIDS"
    kill -TERM "$supervisor" 2>/dev/null || kill -TERM "$trainer" 2>/dev/null || :
    if ! ended_within "$wait"; then
      [ -n "$kill" ] || give_up "The trainer on $(hostname) has not ended within $wait seconds: on several hosts it stops between two steps, not while it reads texts or evaluates. Wait longer with --wait, or give it up with --kill; its last checkpoint stays good."
      kill -KILL "$trainer" 2>/dev/null || :
      ended_within 30 || give_up "The trainer on $(hostname) cannot be killed. Start the machine again."
    fi
  fi
  status
}

[ $# -gt 0 ] || fail "No command is given. Commands are install, check, mount, start, status and stop; --help explains them."
command=$1
shift
case $command in
  install | check | mount | start | supervise | status | stop) ;;
  --help) usage; exit 0 ;;
  *) fail "There is no command $command here. Commands are install, check, mount, start, status and stop." ;;
esac
parse 'extras chips hosts bucket nfs mount workdir restarts pause wait' kill "$@"
mkdir -p "$HOME_DIR"
case $command in
  install) install ;;
  check) check ;;
  mount) mount_it ;;
  start) start ;;
  supervise) supervise_here ;;
  status) status ;;
  stop) stop ;;
esac
