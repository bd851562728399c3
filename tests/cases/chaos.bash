# Chaos: at a random moment of a container's life, kills one of its processes or containerd, or disturbs the host: its
# volume hangs, its clock is slewed, or its processors are busy. The calls may fail, but none may hang, and nothing may
# be left on the host. Sourced after cases/failures.bash.
#
# The host is disturbed only if NUTSHELL_TEST_DISTURBANCES is set: such rounds take longer.

# A volume of all containers, which write to it all the time.
volume=/run/volume

# Time limit of a call in seconds, and with busy processors, which also slow down the client.
CALL_LIMIT=10
BUSY_CALL_LIMIT=30

# call MOMENT COMMAND...: announces MOMENT and runs the command. The command may fail, but not reach the time limit
# $limit, in seconds.
call() {
  local moment=$1 status=0 from=$SECONDS
  shift
  echo "$moment" >>/run/tmp/moments
  timeout -s KILL "$limit" "$@" >>/run/tmp/calls 2>&1 || status=$?
  echo "$moment: status $status after $((SECONDS - from)) s: $*" >>/run/tmp/calls
  # The time decides, not the status: some of these commands also exit with the status of a killed program.
  ((SECONDS - from < limit)) || echo "$moment took $limit s: $*" >>/run/tmp/hung
}

# live NAME: the life of a container. Each step runs even if the previous one failed.
live() {
  call container ctr container create --snapshotter "$snapshotter" --runtime "$runtime" \
    --mount "type=bind,src=$volume,dst=/volume,options=rbind" "localhost/$image:latest" "$1" \
    sh -c 'while :; do date >/volume/date; sleep 0.1; done'
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

# slew TICK: changes the speed of the host's clock: 10000 is normal, 10100 is 1 % faster (adjtimex(2)).
slew() {
  perl -e '
    # struct timex on x86-64 has 208 bytes: modes at 0 (ADJ_TICK is 0x4000), tick at 88.
    my $timex = pack("x208");
    substr($timex, 0, 4) = pack("L", 0x4000);
    substr($timex, 88, 8) = pack("q", $ARGV[0]);
    die "adjtimex: $!" if syscall(159, $timex) < 0;' "$1"
}

# disturb WHAT NAME: kills or disturbs WHAT.
disturb() {
  local pid processor
  case $1 in
    volume) fsfreeze -f "$volume" ;;
    clock) slew $((RANDOM % 2 ? 10100 : 9900)) ;;
    processors)
      for ((processor = 0; processor < $(nproc); processor++)); do
        (exec -a busy sh -c 'while :; do :; done') &
        busy+=($!)
      done
      ;;
    *)
      for pid in $(victim "$1" "$2"); do
        killed=$pid
        ((pid == 0)) || kill -9 "$pid" 2>/dev/null || true
      done
      ;;
  esac
}

# calm WHAT NAME: ends the disturbance.
calm() {
  local server
  case $1 in
    volume)
      fsfreeze -u "$volume"
      # A file server that was blocked ends after its shim, which leaves its control group behind.
      for server in $(pids_of fs); do tail --pid="$server" -f /dev/null; done
      rmdir "/sys/fs/cgroup/default/$2" 2>/dev/null || true
      ;;
    clock) slew 10000 ;;
    processors)
      kill -9 "${busy[@]}"
      wait "${busy[@]}" 2>/dev/null || true
      ;;
  esac
}

# round NUMBER WHAT MOMENT MILLISECONDS: kills or disturbs WHAT this long after MOMENT.
round() {
  local what=$2 moment=$3 delay=$4 killed= busy=() limit=$CALL_LIMIT
  [[ $what != processors ]] || limit=$BUSY_CALL_LIMIT
  name=chaos-$1
  rm -f /run/tmp/{moments,calls,hung}
  : >/run/tmp/moments
  live "$name" &
  local life=$!
  grep -q -m 1 -E "^($moment|end)$" < <(tail -n +1 -f --pid="$life" /run/tmp/moments)
  read -r -t "$(printf '%d.%03d' $((delay / 1000)) $((delay % 1000)))" -u "$never" || true
  disturb "$what" "$name"
  if [[ $what == containerd ]]; then
    while [[ -e /proc/$killed ]]; do read -r -t 0.05 -u "$never" || true; done
    start_containerd
  fi
  wait "$life"
  # A user cleans up like this, in any state of the container.
  call cleanup ctr task delete --force "$name"
  calm "$what" "$name"
  call cleanup ctr task delete --force "$name"
  call cleanup ctr container delete "$name"
  [[ ! -e /run/tmp/hung ]] || {
    cat /run/tmp/hung /run/tmp/calls
    return 1
  }
  # ctr leaves its fifos if the shim was killed.
  rm -rf /run/containerd/fifo/* /run/tmp/moments /run/tmp/calls "$volume"/*
}

# chaos_cases ROUNDS SEED: prints the seed, which replays the run.
chaos_cases() {
  local whats=(shim vmm fs containerd init) moments=(start start exec kill delete)
  local number what moment delay
  RANDOM=$2
  [[ -z ${NUTSHELL_TEST_DISTURBANCES:-} ]] || whats+=(volume clock processors)
  echo "chaos: $1 rounds, NUTSHELL_TEST_SEED=$2"
  # A file system that can be frozen. Writes to it then hang, and the processes that write cannot be killed.
  modprobe loop
  truncate -s 16M /run/volume.ext4
  mkfs.ext4 -q /run/volume.ext4
  mkdir "$volume"
  mount -o loop /run/volume.ext4 "$volume"
  for ((number = 1; number <= $1; number++)); do
    what=${whats[RANDOM % ${#whats[@]}]} moment=${moments[RANDOM % 5]} delay=$((RANDOM % 500))
    # Start takes longest, because it boots the machine.
    [[ $moment != start ]] || delay=$((delay * 8))
    check "chaos $number: $what is hit $delay ms into $moment" round "$number" "$what" "$moment" "$delay"
  done
  umount "$volume"
  rm -r "$volume" /run/volume.ext4
}
