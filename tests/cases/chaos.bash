# Chaos: kills a random process of a container, or containerd, at a random moment of the container's life. The calls
# may fail, but none may hang, and nothing may be left on the host. Sourced after cases/failures.bash.

# Time limit of a call in seconds.
CALL_LIMIT=10

# call MOMENT COMMAND...: announces MOMENT and runs the command. The command may fail, but not reach the time limit.
call() {
  local moment=$1 status=0 from=$SECONDS
  shift
  echo "$moment" >>/run/tmp/moments
  timeout -s KILL "$CALL_LIMIT" "$@" >>/run/tmp/calls 2>&1 || status=$?
  echo "$moment: status $status after $((SECONDS - from)) s: $*" >>/run/tmp/calls
  # The time decides, not the status: some of these commands also exit with the status of a killed program.
  ((SECONDS - from < CALL_LIMIT)) || echo "$moment took $CALL_LIMIT s: $*" >>/run/tmp/hung
}

# live NAME: the life of a container. Each step runs even if the previous one failed.
live() {
  call container ctr container create --snapshotter "$snapshotter" --runtime "$runtime" \
    "localhost/$image:latest" "$1" sleep 1000
  call start ctr task start -d --null-io "$1"
  call exec ctr task exec --exec-id one "$1" true
  call kill ctr task kill --signal SIGKILL "$1"
  local try
  for try in {1..100}; do
    [[ $(ctr task ls 2>/dev/null) == *"$1"*RUNNING* ]] || break
    read -r -t 0.1 -u "$never" || true
  done
  call delete ctr task delete "$1"
  echo end >>/run/tmp/moments
}

# victim WHAT NAME: prints the pids to kill. init is the process of container NAME.
victim() {
  case $1 in
    containerd) cat /run/containerd.pid ;;
    init) pid_of "$2" ;;
    *) pids_of "$1" ;;
  esac
}

# round NUMBER WHAT MOMENT MILLISECONDS: kills WHAT this long after MOMENT.
round() {
  local what=$2 moment=$3 delay=$4 pid killed=
  name=chaos-$1
  rm -f /run/tmp/{moments,calls,hung}
  : >/run/tmp/moments
  live "$name" &
  local life=$!
  grep -q -m 1 -E "^($moment|end)$" < <(tail -n +1 -f --pid="$life" /run/tmp/moments)
  read -r -t "$(printf '%d.%03d' $((delay / 1000)) $((delay % 1000)))" -u "$never" || true
  for pid in $(victim "$what" "$name"); do
    killed=$pid
    ((pid == 0)) || kill -9 "$pid" 2>/dev/null || true
  done
  if [[ $what == containerd ]]; then
    while [[ -e /proc/$killed ]]; do read -r -t 0.05 -u "$never" || true; done
    start_containerd
  fi
  wait "$life"
  # A user cleans up like this, in any state of the container.
  call cleanup ctr task delete --force "$name"
  call cleanup ctr container delete "$name"
  [[ ! -e /run/tmp/hung ]] || {
    cat /run/tmp/hung /run/tmp/calls
    return 1
  }
  # ctr leaves its fifos if the shim was killed.
  rm -rf /run/containerd/fifo/* /run/tmp/moments /run/tmp/calls
}

# chaos_cases ROUNDS SEED: prints the seed, which replays the run.
chaos_cases() {
  local whats=(shim vmm fs containerd init) moments=(start start exec kill delete) number what moment delay
  RANDOM=$2
  echo "chaos: $1 rounds, NUTSHELL_TEST_SEED=$2"
  for ((number = 1; number <= $1; number++)); do
    what=${whats[RANDOM % 5]} moment=${moments[RANDOM % 5]} delay=$((RANDOM % 500))
    # Start takes longest, because it boots the machine.
    [[ $moment != start ]] || delay=$((delay * 8))
    check "chaos $number: $what is killed $delay ms into $moment" round "$number" "$what" "$moment" "$delay"
  done
}
