# Containers of the Docker Engine. Sourced by tests/suites/docker.sh, after tests/lab/docker.bash.

# docker_run [OPTION...] IMAGE [COMMAND...]: `docker run` with nutshell.
docker_run() { docker run --runtime "$runtime" "$@"; }

# start_container NAME [OPTION...] [-- COMMAND...]: runs a container in the background, `sleep 1000` without a command.
start_container() {
  local name=$1 options=() command=(sleep 1000)
  shift
  while (($#)) && [[ $1 != -- ]]; do
    options+=("$1")
    shift
  done
  (($# == 0)) || command=("${@:2}")
  docker_run --detach --name "$name" "${options[@]}" busybox "${command[@]}" >/dev/null
}

# inspect NAME FORMAT
inspect() { docker inspect --format "$2" "$1"; }

# remove NAME...: removes containers in any state.
remove() { docker rm --force --volumes "$@" >/dev/null; }

# wait_until EXPECTED COMMAND...: waits until the output of COMMAND is EXPECTED. Limited to 300 tries.
wait_until() {
  local expected=$1 actual='' try
  shift
  for try in {1..300}; do
    actual=$("$@" 2>&1) || true
    [[ $actual != "$expected" ]] || return 0
    read -r -t 0.1 -u "$never" || true
  done
  printf '%s: expected: %s\n  actual: %s\n' "$*" "$expected" "$actual" >&2
  return 1
}

run_passes_output_and_exit_status() {
  local status
  docker_run --rm busybox sh -c 'echo out; echo err >&2' >/run/tmp/out 2>/run/tmp/err
  assert_equal out "$(</run/tmp/out)"
  assert_equal err "$(</run/tmp/err)"
  rm /run/tmp/out /run/tmp/err
  for status in 1 42 255; do assert_status "$status" docker_run --rm busybox sh -c "exit $status"; done
}

command_that_cannot_run_reports_127_or_126() {
  assert_status 127 docker_run --rm busybox no-such-command 2>/run/tmp/err
  assert_contains "$(</run/tmp/err)" 'exec: "no-such-command": executable file not found in $PATH'
  assert_status 126 docker_run --rm busybox /etc/passwd 2>/run/tmp/err
  assert_contains "$(</run/tmp/err)" 'exec: "/etc/passwd": permission denied'
  rm /run/tmp/err
}

detached_container_is_waited_for_and_removed() {
  start_container one -- sh -c 'echo started; sleep 1; exit 7'
  assert_equal 7 "$(docker wait one)"
  assert_equal started "$(docker logs one)"
  assert_equal "exited 7 false 0" "$(inspect one '{{.State.Status}} {{.State.ExitCode}} {{.State.Running}} {{.State.Pid}}')"
  docker rm one >/dev/null
  # With --rm the daemon removes it.
  start_container two --rm -- true
  wait_until "" docker ps --all --quiet
}

created_container_is_started_and_attached() {
  docker create --runtime "$runtime" --name one --interactive busybox sh -c 'cat; exit 3' >/dev/null
  assert_equal created "$(inspect one '{{.State.Status}}')"
  assert_status 3 docker start --attach --interactive one <<<text >/run/tmp/out
  assert_equal text "$(</run/tmp/out)"
  rm /run/tmp/out
  remove one
}

terminal_is_a_tty_with_the_clients_size() {
  # docker needs a terminal, which script(1) provides.
  script -qec "stty rows 33 cols 77; docker run --rm -it --runtime $runtime busybox sh -c \
    'test -t 0 && test -t 1 && test -t 2 && tty && until stty size | grep \"33 77\"; do :; done; exit 9'" \
    /dev/null </dev/null >/run/tmp/out || assert_equal 9 $?
  assert_contains "$(</run/tmp/out)" /dev/pts/
  assert_contains "$(</run/tmp/out)" "33 77"
  rm /run/tmp/out
}

stdin_reaches_the_container() {
  head -c 5M /dev/urandom >/run/tmp/in
  assert_equal "$(md5sum </run/tmp/in)" "$(docker_run --rm --interactive busybox md5sum </run/tmp/in)"
  rm /run/tmp/in
}

exec_has_its_own_settings_and_exit_status() {
  start_container one --env FROM=run
  assert_equal "run exec /tmp 65534:65534" \
    "$(docker exec --env ADDED=exec --workdir /tmp --user nobody one sh -c 'echo $FROM $ADDED $(pwd) $(id -u):$(id -g)')"
  assert_status 5 docker exec one sh -c 'exit 5'
  assert_status 137 docker exec one sh -c 'kill -9 $$'
  assert_contains "$(docker exec one no-such-command 2>&1 || true)" "executable file not found in \$PATH"
  assert_equal input "$(docker exec --interactive one cat <<<input)"
  docker exec --detach one sh -c 'echo detached >/tmp/file'
  wait_until detached docker exec one cat /tmp/file
  script -qec "docker exec -it one tty" /dev/null </dev/null >/run/tmp/out
  assert_contains "$(</run/tmp/out)" /dev/pts/
  rm /run/tmp/out
  remove one
}

files_are_copied_in_and_out() {
  start_container one
  head -c 3M /dev/urandom >/run/tmp/in
  docker cp -q /run/tmp/in one:/tmp/file
  assert_equal "$(md5sum </run/tmp/in)" "$(docker exec -i one sh -c 'md5sum </tmp/file')"
  # A file that the guest knows already is replaced.
  echo second >/run/tmp/in
  docker cp -q /run/tmp/in one:/tmp/file
  assert_equal second "$(docker exec one cat /tmp/file)"
  docker exec one sh -c 'mkdir /tmp/folder && echo inside >/tmp/folder/file && ln -s file /tmp/folder/link'
  docker cp -q one:/tmp/folder /run/tmp/copy
  assert_equal "inside file" "$(cat /run/tmp/copy/file) $(readlink /run/tmp/copy/link)"
  docker stop --time 0 one >/dev/null
  docker cp -q one:/tmp/folder/file - | tar -xOf - >/run/tmp/out
  assert_equal inside "$(</run/tmp/out)"
  rm -r /run/tmp/in /run/tmp/out /run/tmp/copy
  remove one
}

# Without `docker export`: with this engine it leaves a mount behind, with runc too.
changes_are_listed_and_committed() {
  start_container one -- sh -c 'echo text >/file; rm /etc/group'
  docker wait one >/dev/null
  assert_equal "A /file C /etc D /etc/group" "$(echo $(docker diff one | sort))"
  docker commit one changed >/dev/null
  assert_equal text "$(docker_run --rm changed cat /file)"
  remove one
  docker image rm changed >/dev/null
}

logs_are_complete_after_a_fast_exit() {
  local try
  for try in 1 2 3; do
    start_container "fast$try" -- sh -c 'seq 1 20000; echo error >&2; printf "without newline"'
    assert_equal 0 "$(docker wait "fast$try")"
    assert_equal "$(seq 1 20000; printf "without newline")" "$(docker logs "fast$try" 2>/run/tmp/err)"
    assert_equal error "$(</run/tmp/err)"
    remove "fast$try"
  done
  assert_equal "$(seq 1 20000)" "$(docker_run --rm busybox seq 1 20000)"
  rm /run/tmp/err
}

logs_follow_the_container_to_its_end() {
  start_container one -- sh -c 'echo first; while [ ! -e /go ]; do sleep 0.1; done; echo last'
  docker logs --follow one >/run/tmp/out &
  local follower=$!
  wait_until first cat /run/tmp/out
  docker exec one touch /go
  wait "$follower"
  assert_equal "first last" "$(echo $(</run/tmp/out))"
  assert_equal last "$(docker logs --tail 1 one)"
  rm /run/tmp/out
  remove one
}

stats_are_those_of_the_guest() {
  start_container one --memory 128m -- sh -c 'head -c 20971520 /dev/zero >/dev/shm/file; while :; do :; done'
  wait_until $((20 << 20)) docker exec one stat -c %s /dev/shm/file
  local cpu used limit processes received
  read -r cpu used limit processes received < <(docker stats --no-stream \
    --format '{{.CPUPerc}} {{.MemUsage}} {{.PIDs}} {{.NetIO}}' one | tr -d '/')
  echo "cpu $cpu memory $used limit $limit processes $processes received $received"
  ((${cpu%.*} >= 20 && ${cpu%.*} <= 220))
  [[ $used == *MiB ]]
  used=${used%%[.M]*}
  ((used >= 20 && used <= 60))
  assert_equal 128MiB "$limit"
  ((processes >= 1 && processes <= 3))
  [[ $received == [1-9]* ]]
  remove one
}

top_lists_no_processes_of_the_host() {
  start_container one -- sh -c 'sleep 1001 & sleep 1002'
  local processes pid
  pid=$(inspect one '{{.State.Pid}}')
  processes=$(docker top one -eo pid,comm)
  echo "$processes"
  assert_contains "$processes" "$pid"
  assert_equal "" "$(awk -v pid="$pid" 'NR > 1 && $1 != pid' <<<"$processes")"
  remove one
}

state_reports_pid_and_exit() {
  start_container one -- sh -c 'sleep 1000; exit 1'
  local pid
  pid=$(inspect one '{{.State.Pid}}')
  ((pid > 1)) && [[ -e /proc/$pid ]]
  assert_equal "running true false false 0" \
    "$(inspect one '{{.State.Status}} {{.State.Running}} {{.State.Paused}} {{.State.OOMKilled}} {{.State.ExitCode}}')"
  # A signal to this pid reaches the container.
  kill -KILL "$pid"
  assert_equal 137 "$(docker wait one)"
  assert_equal "exited false 137" "$(inspect one '{{.State.Status}} {{.State.OOMKilled}} {{.State.ExitCode}}')"
  remove one
}

out_of_memory_is_reported() {
  start_container one --memory 32m -- tail /dev/zero
  assert_equal 137 "$(docker wait one)"
  assert_equal "true 137" "$(inspect one '{{.State.OOMKilled}} {{.State.ExitCode}}')"
  remove one
}

stop_sends_term_and_kills_after_the_timeout() {
  local start
  start_container handles -- sh -c 'trap "exit 143" TERM; echo ready; while :; do sleep 0.1; done'
  start_container ignores
  wait_until ready docker logs handles
  docker stop --time 30 handles >/dev/null
  assert_equal 143 "$(inspect handles '{{.State.ExitCode}}')"
  start=$SECONDS
  docker stop --time 2 ignores >/dev/null
  assert_equal 137 "$(inspect ignores '{{.State.ExitCode}}')"
  ((SECONDS - start >= 2 && SECONDS - start < 12))
  remove handles ignores
}

kill_sends_any_signal() {
  start_container one -- sh -c 'trap "echo usr1" USR1; trap "exit 4" HUP; echo ready; while :; do sleep 0.1; done'
  wait_until ready docker logs one
  docker kill --signal USR1 one >/dev/null
  wait_until $'ready\nusr1' docker logs one
  docker kill --signal SIGHUP one >/dev/null
  assert_equal 4 "$(docker wait one)"
  assert_contains "$(docker kill one 2>&1 || true)" "is not running"
  docker start one >/dev/null
  docker kill one >/dev/null
  assert_equal 137 "$(docker wait one)"
  remove one
}

paused_container_makes_no_progress() {
  start_container one -- sh -c 'n=0; while :; do n=$((n + 1)); echo $n >/run/count; sleep 0.05; done'
  docker pause one >/dev/null
  assert_equal "paused true" "$(inspect one '{{.State.Status}} {{.State.Paused}}')"
  local before
  docker cp -q one:/run/count /run/tmp/count
  before=$(</run/tmp/count)
  read -r -t 1 -u "$never" || true
  docker cp -q one:/run/count /run/tmp/count
  assert_equal "$before" "$(</run/tmp/count)"
  docker unpause one >/dev/null
  assert_equal running "$(inspect one '{{.State.Status}}')"
  local try
  for try in {1..100}; do
    docker cp -q one:/run/count /run/tmp/count
    [[ $(</run/tmp/count) == "$before" ]] || break
  done
  (($(</run/tmp/count) > before))
  docker pause one >/dev/null
  remove one
  rm /run/tmp/count
}

restarted_container_keeps_its_files() {
  start_container one -- sh -c 'echo started >>/file; exec sleep 1000'
  local before
  wait_until started docker exec one cat /file
  before=$(inspect one '{{.State.StartedAt}}')
  docker restart --time 0 one >/dev/null
  [[ $(inspect one '{{.State.StartedAt}}') != "$before" ]]
  wait_until $'started\nstarted' docker exec one cat /file
  docker stop --time 0 one >/dev/null
  docker start one >/dev/null
  wait_until $'started\nstarted\nstarted' docker exec one cat /file
  remove one
}

limits_are_updated_while_it_runs() {
  start_container one --memory 128m --memory-swap 128m --cpus 1
  assert_equal "$((128 << 20)) 100000 100000" "$(echo $(docker exec one cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max))"
  docker update --memory 64m --memory-swap 64m --cpus 0.5 --pids-limit 50 one >/dev/null
  assert_equal "$((64 << 20)) 50000 100000 50" \
    "$(echo $(docker exec one cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max /sys/fs/cgroup/pids.max))"
  assert_equal $((64 << 20)) "$(inspect one '{{.HostConfig.Memory}}')"
  remove one
  assert_equal 2 "$(docker_run --rm --cpus 1.5 busybox nproc)"
}

events_describe_the_life_of_a_container() {
  local from
  from=$(date +%s.%N)
  start_container one -- sh -c 'sleep 1000; true'
  docker exec one true
  docker kill --signal CONT one >/dev/null
  docker pause one >/dev/null
  docker unpause one >/dev/null
  docker stop --time 0 one >/dev/null
  remove one
  docker events --since "$from" --until "$(date +%s.%N)" --filter container=one \
    --format '{{.Action}}{{with .Actor.Attributes.exitCode}} {{.}}{{end}}' >/run/tmp/out
  cat /run/tmp/out
  # The daemon reports the end of an exec, and that of `docker stop`, before or after what follows.
  assert_equal "create start exec_create: true exec_start: true kill pause unpause kill kill die 137 destroy" \
    "$(echo $(grep -v -e exec_die -e stop /run/tmp/out))"
  assert_equal stop "$(grep stop /run/tmp/out)"
  assert_equal "exec_die 0" "$(grep exec_die /run/tmp/out)"
  rm /run/tmp/out
}

docker_cases() {
  docker_check "run passes output and exit status" run_passes_output_and_exit_status
  docker_check "command that cannot run reports 127 or 126" command_that_cannot_run_reports_127_or_126
  docker_check "detached container is waited for and removed" detached_container_is_waited_for_and_removed
  docker_check "created container is started and attached" created_container_is_started_and_attached
  docker_check "terminal is a tty with the client's size" terminal_is_a_tty_with_the_clients_size
  docker_check "stdin reaches the container" stdin_reaches_the_container
  docker_check "exec has its own settings and exit status" exec_has_its_own_settings_and_exit_status
  docker_check "files are copied in and out" files_are_copied_in_and_out
  docker_check "changes are listed and committed" changes_are_listed_and_committed
  docker_check "logs are complete after a fast exit" logs_are_complete_after_a_fast_exit
  docker_check "logs follow the container to its end" logs_follow_the_container_to_its_end
  docker_check "stats are those of the guest" stats_are_those_of_the_guest
  docker_check "top lists no processes of the host" top_lists_no_processes_of_the_host
  docker_check "state reports pid and exit" state_reports_pid_and_exit
  docker_check "out of memory is reported" out_of_memory_is_reported
  docker_check "stop sends TERM and kills after the timeout" stop_sends_term_and_kills_after_the_timeout
  docker_check "kill sends any signal" kill_sends_any_signal
  docker_check "paused container makes no progress" paused_container_makes_no_progress
  docker_check "restarted container keeps its files" restarted_container_keeps_its_files
  docker_check "limits are updated while it runs" limits_are_updated_while_it_runs
  docker_check "events describe the life of a container" events_describe_the_life_of_a_container
}
