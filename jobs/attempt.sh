# What a batch script does before and after srun: it notes each attempt of the job, and decides whether the job comes back.
# It is bash alone, because outside of the container a node need not have Python. The batch script sets:
#   run   folder of the run
#   job   folder of what concerns its job: attempts.jsonl, outcome.json, hold
#   log   what this script and srun print
#   silence       what an exit code 0 means without an outcome.json
#   max_stalled   times in a row that the job may come back without a newer checkpoint

OUT_OF_MEMORY='oom.kill\|out of memory\|exceeded memory limit'

newest_checkpoint() {
  local name newest=""
  for name in "$run/checkpoints/step-"*; do
    [ -d "$name" ] && newest=${name##*/step-}
  done
  echo "$newest"
}

# json WORD: as a string of JSON; what cannot be in one is left out.
json() { printf '"%s"' "$(printf '%s' "$1" | tr -d '\000-\037\\"' | head -c 500)"; }

# note KIND NAME VALUE ...: one line of the record; values are JSON already.
note() {
  local line
  line=$(printf '{"event": "%s", "time": %s, "job": "%s", "restart": %s' "$1" "$(date +%s)" "$SLURM_JOB_ID" "${SLURM_RESTART_COUNT:-0}")
  shift
  while [ $# -gt 0 ]; do line+=", \"$1\": $2"; shift 2; done
  echo "$line}" >>"$job/attempts.jsonl"
}

# state_of_lost JOB: what SLURM said about a start that ended without a word: its node died, or it was killed at once.
state_of_lost() {
  local rows
  rows=$(timeout 20 sacct -D -X -n -P -j "$1" -o State 2>/dev/null)
  [ "$1" != "$SLURM_JOB_ID" ] || rows=$(sed '$d' <<<"$rows") # the last row is this start
  rows=$(tail -n 1 <<<"$rows")
  echo "${rows:-unknown}"
}

begin() {
  umask 077
  mkdir -p "$job" "$run/logs" # srun makes no folders
  trap : TERM USR1 USR2 # the ranks get the signals too, and this script waits for what they make of them
  log_start=$(($(stat -c %s "$log" 2>/dev/null || echo 0) + 1))
  local size file
  declare -gA rank_start=()
  while read -r size file; do rank_start[$file]=$((size + 1)); done < <(stat -c '%s %n' "$run/logs/rank-"*.txt 2>/dev/null)
  lost=$(tail -n 1 "$job/attempts.jsonl" 2>/dev/null | sed -n 's/^{"event": "start".*"job": "\([0-9]*\)".*/\1/p')
  [ -z "$lost" ] || note lost why "$(json "$(state_of_lost "$lost")")"
  rm -f "$job/outcome.json"
  touch "$job/started"
  step_before=$(newest_checkpoint)
  note start nodes "$(json "$SLURM_JOB_NODELIST")" checkpoint "$(json "$step_before")"
  echo "--- $(date -u +%FT%TZ) job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST"
}

# rank_says FILE: what a rank has said in this start.
rank_says() { tail -c "+${rank_start[$1]:-1}" "$1" 2>/dev/null; }

# step_messages: what SLURM's daemons of the nodes have written between the lines of the ranks.
step_messages() {
  local file
  for file in "$run/logs/rank-"*.txt; do rank_says "$file" | grep 'slurmstepd.*: error: '; done
}

# why CODE MESSAGES: how the ranks ended, in words.
why() {
  local kind
  kind=$(sed -n 's/^{"kind": "\([a-z ]*\)".*/\1/p' "$job/outcome.json" 2>/dev/null)
  if grep -q ' JOB [0-9]* ON [^ ]* CANCELLED AT [^ ]* \*\*\*' <<<"$2"; then
    echo cancelled # by its user: with a reason such as a time limit, SLURM adds DUE TO
  elif [ "$1" = 0 ]; then
    echo "${kind:-$silence}"
  elif [ "$kind" = stopped ] || [ "$kind" = mistake ] || [ "$kind" = "gave up" ]; then
    echo "$kind"
  elif [ -n "$(find "$run/logs" -name 'hang-rank-*.txt' -size +0 -newer "$job/started" 2>/dev/null)" ]; then
    echo "hung" # logs/hang-rank-*.txt shows where
  elif grep -qi "$OUT_OF_MEMORY" <<<"$2"; then
    echo "out of memory"
  elif grep -qi 'node failure\|node_fail' <<<"$2"; then
    echo "node failure"
  elif grep -q 'DUE TO TIME LIMIT' <<<"$2"; then
    echo "time limit" # the ranks did not save in time
  elif [ "$1" -ge 128 ]; then
    echo "killed by SIG$(kill -l "$1")"
  elif [ "$1" = 75 ]; then
    echo "stopped before training"
  elif [ "$1" = 2 ]; then
    echo mistake
  else
    echo crashed
  fi
}

# end CODE: notes how srun ended, and either asks SLURM to start the job again or exits. 0 only for a run that is finished.
end() {
  local code=$1 messages reason detail step stalled=0 again=false
  trap '' TERM USR1 USR2 # a trap does not hold in what this function calls, and SLURM may be ending the job already
  messages=$(tail -c "+$log_start" "$log")
  [ "$code" = 0 ] || messages+=$'\n'$(step_messages)
  reason=$(why "$code" "$messages")
  if [ "$reason" = stopped ]; then
    detail=$(rank_says "$run/logs/rank-0.txt" | grep -o 'stopped by SIG[A-Z0-9]*' | tail -n 1)
  elif [ "$reason" = "out of memory" ]; then
    detail=$(grep -m 1 -i "$OUT_OF_MEMORY" <<<"$messages")
  else
    detail=$(grep -m 1 'srun: error: ' <<<"$messages")
  fi
  step=$(newest_checkpoint)
  [ "$step" != "$step_before" ] || stalled=$(($(cat "$job/stalled" 2>/dev/null || echo 0) + 1))
  echo "$stalled" >"$job/stalled"
  case $reason in
    finished | mistake | "gave up" | cancelled) ;;
    *) [ -e "$job/hold" ] || [ "$stalled" -gt "$max_stalled" ] || again=true ;;
  esac
  note end code "$code" why "$(json "$reason")" again "$again" stalled "$stalled" checkpoint "$(json "$step")" detail "$(json "$detail")"
  [ "$reason" = stopped ] && reason=${detail:-stopped}
  echo "--- $(date -u +%FT%TZ) $reason (exit code $code), newest checkpoint ${step:-none}"
  if [ "$again" = true ]; then
    # Where a node has failed, SLURM may have queued it again by itself.
    if scontrol requeue "$SLURM_JOB_ID" || [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = PENDING ]; then
      for _ in {1..60}; do sleep 2; done # SLURM ends this script, and what it waits for first
      exit "$code"
    fi
    note end code "$code" why "$(json "$reason")" again false detail "$(json "scontrol requeue failed")"
  elif [ "$stalled" -gt "$max_stalled" ]; then
    echo "--- it ended $stalled times without a newer checkpoint, so it does not come back"
  fi
  [ "$reason" = finished ] && exit 0
  exit $((code == 0 ? 75 : code))
}
