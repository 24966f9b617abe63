#!/usr/bin/env bash
# A training job on Slurm that goes on by itself after its time limit (docs/pods.md explains every step):
#
#   bash launch/pod/slurm.sh COMMAND --name=NAME --flag=value ... [--dry_run] [-- TRAIN FLAGS]
#
#   submit  --nodes=2 --gpus_per_node=8 --time=24:00:00 --workdir=DIR -- --config=FILE ...
#           [--python=.venv/bin/python] [--logs=WORKDIR.logs] [--grace=120] [--restarts=3] [--pause=120] [--requeues=100]
#           [--partition= --account= --qos= --constraint= --mem= --cpus_per_task=]
#   status  the job in the queue
#   watch   follows the log of a node  --workdir=DIR | --logs=DIR  [--worker=0] [--lines=50]
#   stop    the trainers save and end, and the job does not come back  [--wait=600]
#
# --dry_run prints the commands that would be run and runs nothing. Checkout, Python environment and workdir must lie on a
# file system that all nodes see.

set -euo pipefail
# shellcheck source=launch/pod/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

name=
nodes=
gpus_per_node=
time=
workdir=
python=$ROOT/.venv/bin/python
logs=
grace=120
restarts=3
pause=120
requeues=100
partition=
account=
qos=
constraint=
mem=
cpus_per_task=
worker=0
lines=50
wait=600

# Seconds of a Slurm time: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, ...:seconds.
seconds_of() {
  local days=0 rest=$1 a b c
  if [[ $rest == *-* ]]; then
    days=${rest%%-*}
    rest=${rest#*-}
    IFS=: read -r a b c <<<"$rest"
    echo $((10#$days * 86400 + 10#$a * 3600 + 10#${b:-0} * 60 + 10#${c:-0}))
  else
    IFS=: read -r a b c <<<"$rest"
    if [ -n "$c" ]; then
      echo $((10#$a * 3600 + 10#$b * 60 + 10#$c))
    else
      echo $((10#$a * 60 + 10#${b:-0}))
    fi
  fi
}

# The ids of this user's jobs of that name.
jobs_now() { squeue --me --noheader "--name=$name" '--format=%A'; }

submit() {
  local flags ids
  train_flags "$workdir" "$nodes"
  if [ -z "$dry_run" ]; then
    [ -x "$python" ] || fail "--python=$python is no Python that can be run. Make an environment on a shared file system, and install the project in it: pip install -e '.[cuda]'."
    ids=$(jobs_now) || give_up "squeue cannot tell whether $name is queued already; its message is above."
    [ -z "$ids" ] || give_up "A job $name is queued or runs already, as ${ids//$'\n'/ }, and is not started twice. \`status\` shows it; \`stop\` ends it."
  fi
  flags=(--parsable "--job-name=$name" "--nodes=$nodes" --ntasks-per-node=1 "--gpus-per-node=$gpus_per_node" "--time=$time")
  [ -z "$partition" ] || flags+=("--partition=$partition")
  [ -z "$account" ] || flags+=("--account=$account")
  [ -z "$qos" ] || flags+=("--qos=$qos")
  [ -z "$constraint" ] || flags+=("--constraint=$constraint")
  [ -z "$mem" ] || flags+=("--mem=$mem")
  [ -z "$cpus_per_task" ] || flags+=("--cpus-per-task=$cpus_per_task")
  # The signal goes to the trainers, not to the batch script. Logs go on where they were when the job was requeued. Two jobs
  # of one name do not run at the same time.
  flags+=("--signal=TERM@$grace" --requeue --open-mode=append "--output=$logs/%x-%j.log" --dependency=singleton)
  run mkdir -p "$logs"
  run sbatch "${flags[@]}" "$POD_DIR/train.sbatch" "--root=$ROOT" "--python=$python" "--gpus_per_node=$gpus_per_node" \
    "--logs=$logs" "--restarts=$restarts" "--pause=$pause" "--requeues=$requeues" -- "${TRAIN[@]}"
}

# A job that waits is cancelled; one that runs loses the permission to requeue itself, and its trainers are asked to save.
stop() {
  local ids id since=$SECONDS
  if [ -n "$dry_run" ]; then
    run squeue --me --noheader "--name=$name" '--format=%A'
    echo "# For every job that this names:"
    run scancel --state=PENDING JOB
    run scontrol update JobId=JOB Requeue=0
    run scancel --signal=TERM JOB
    return
  fi
  ids=$(jobs_now) || give_up "squeue cannot be asked for the jobs of $name; its message is above."
  [ -n "$ids" ] || { echo "No job $name is queued or runs." && return; }
  for id in $ids; do
    scancel --state=PENDING "$id"
    if [ -n "$(squeue --noheader "--jobs=$id" --states=RUNNING '--format=%A' 2>/dev/null)" ]; then
      scontrol update "JobId=$id" Requeue=0
      scancel --signal=TERM "$id"
    fi
  done
  while [ -n "$(jobs_now)" ]; do
    [ $((SECONDS - since)) -lt "$wait" ] || give_up "A job $name has not ended within $wait seconds. Wait longer with --wait, look at its log with \`watch\`, or cancel it without saving: scancel --me --name=$name."
    sleep 5
  done
  echo "Stopped; what was saved stays. Submitted again, it goes on."
}

watch() {
  local ids
  if [ -n "$dry_run" ]; then
    ids=JOB
  else
    ids=$(jobs_now) || give_up "squeue cannot be asked for the jobs of $name; its message is above."
    [ -n "$ids" ] || give_up "No job $name is queued or runs. Its logs are in $logs."
  fi
  run tail -n "$lines" -F "$logs/$name-${ids%%$'\n'*}-$worker.log"
}

[ $# -gt 0 ] || fail "No command is given. Commands are submit, status, watch and stop; --help explains them."
command=$1
shift
case $command in
  submit) parse 'name nodes gpus_per_node time workdir python logs grace restarts pause requeues partition account qos constraint mem cpus_per_task' dry_run "$@" ;;
  status) parse name dry_run "$@" ;;
  watch) parse 'name workdir logs worker lines' dry_run "$@" ;;
  stop) parse 'name wait' dry_run "$@" ;;
  --help) usage; exit 0 ;;
  *) fail "There is no command $command here. Commands are submit, status, watch and stop." ;;
esac

require name muxbert
matches name "$DNS_LABEL" "$DNS_RULE"
positive grace pause requeues lines wait
matches restarts '^[0-9]{1,4}$' "is no number of restarts. Write it in digits; 0 for none."
matches worker '^[0-9]{1,4}$' "is no worker. Write its number, from 0."
for flag in partition account qos constraint mem; do
  matches $flag '^[A-Za-z0-9][-_.,&|*@A-Za-z0-9]*$' "is no value that Slurm takes. Write it as your site's documentation does."
done
absolute workdir
absolute logs
absolute python
if [ "$command" = submit ]; then
  require nodes 2 gpus_per_node 8 time 24:00:00 workdir /scratch/runs/muxbert
  positive nodes gpus_per_node
  [ -z "$cpus_per_task" ] || positive cpus_per_task
  matches time '^([0-9]+(:[0-9]{1,2}){0,2}|[0-9]+-[0-9]{1,2}(:[0-9]{1,2}){0,2})$' "is no time limit. Write minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS, for instance --time=24:00:00."
  # Slurm may send the signal up to a minute early, and a job needs a few minutes to start.
  [ "$(seconds_of "$time")" -ge $((grace + 300)) ] || fail "--time=$time is too short: the trainer saves --grace=$grace seconds before the end and needs five minutes to start. Raise --time."
  check_train_flags
else
  [ ${#EXTRA[@]} -eq 0 ] || fail "'${EXTRA[0]}' stands after a bare --, but only submit takes flags of launch.train. Leave it out."
fi
[ "$command" != watch ] || [ -n "$workdir$logs" ] || fail "Neither --workdir nor --logs is given. Give the folder of the run, or that of its logs."
[ -n "$logs" ] || logs=$workdir.logs

case $command in
  submit) submit ;;
  status) run squeue --me "--name=$name" '--format=%A %j %T %M %l %D %r' ;;
  watch) watch ;;
  stop) stop ;;
esac
