# Standard streams of a client of containerd: fifos, files, logging programs, terminals. Sourced by tests/suites/*.sh,
# after tests/cases/containers.bash.

# write_logger [SCRIPT]: writes the logging program /run/tmp/logger. It writes its environment and arguments to
# /run/tmp/log.start and its streams to /run/tmp/log.out and /run/tmp/log.err. SCRIPT runs before it reports ready.
write_logger() {
  cat >/run/tmp/logger <<LOGGER
#!/bin/bash
echo "\$CONTAINER_NAMESPACE \$CONTAINER_ID \$*" >/run/tmp/log.start
${1:-}
exec 5>&-
/bin/cat <&3 >/run/tmp/log.out &
/bin/cat <&4 >/run/tmp/log.err
wait
LOGGER
  chmod +x /run/tmp/logger
}

remove_logger() {
  rm -f /run/tmp/logger /run/tmp/log.{start,out,err}
}

logging_program_gets_both_streams_and_its_arguments() {
  new_name
  write_logger
  nutshell "$name" --rm --log-uri 'binary:///run/tmp/logger?first=a%20b&second' -- sh -c 'echo out; echo err >&2'
  assert_equal "default $name first a b second" "$(sed 's/ $//' /run/tmp/log.start)"
  assert_equal out "$(</run/tmp/log.out)"
  assert_equal err "$(</run/tmp/log.err)"
  remove_logger
}

logging_program_of_an_exec_gets_its_streams() {
  new_name
  write_logger 'echo ready >&5'
  nutshell "$name" -d -- sleep 1000
  ctr task exec --exec-id logged --log-uri 'binary-v2:///run/tmp/logger' "$name" sh -c 'echo out; echo err >&2'
  assert_equal "default logged" "$(sed 's/ $//' /run/tmp/log.start)"
  assert_equal "out err" "$(</run/tmp/log.out) $(</run/tmp/log.err)"
  remove "$name"
  remove_logger
}

failure_of_the_logging_program_fails_the_create() {
  local output
  new_name
  write_logger 'echo no room in the log >&2; exit 3'
  ! output=$(nutshell "$name" --rm --log-uri binary:///run/tmp/logger -- true 2>&1) || return 1
  assert_contains "$output" "logger exited with status 3: no room in the log"
  new_name
  ! output=$(nutshell "$name" --rm --log-uri binary:///no/such/logger -- true 2>&1) || return 1
  assert_contains "$output" "/no/such/logger: No such file or directory"
  remove_logger
}

log_file_gets_both_streams() {
  new_name
  nutshell "$name" --rm --log-uri file:///run/tmp/deep/log -- sh -c 'echo first; echo second >&2; echo third'
  # There is no order between two streams.
  assert_equal "first second third" "$(sort /run/tmp/deep/log | xargs)"
  rm -r /run/tmp/deep
}

# Just before its exit, a process writes this to each stream: 205 times 40 KiB, more than 8 MiB.
write_text='text=$(seq -w 8192); for turn in $(seq 205); do echo "$text"; done'
burst="$write_text; { $write_text; } >&2"

assert_burst_arrived() {
  local expected
  expected=$(eval "$write_text" | sha256sum)
  assert_equal $((205 * 40960)) "$(stat -c %s /run/tmp/out)"
  assert_equal "$expected" "$(sha256sum </run/tmp/out)"
  assert_equal "$expected" "$(sha256sum </run/tmp/err)"
  rm /run/tmp/out /run/tmp/err
}

output_just_before_the_exit_arrives_in_full() {
  new_name
  nutshell "$name" --rm -- sh -c "$burst" >/run/tmp/out 2>/run/tmp/err
  assert_burst_arrived
}

output_of_an_exec_just_before_its_exit_arrives_in_full() {
  new_name
  nutshell "$name" -d -- sleep 1000
  ctr task exec --exec-id burst "$name" sh -c "$burst" >/run/tmp/out 2>/run/tmp/err
  assert_burst_arrived
  head -c $((20 << 20)) /dev/urandom >/run/tmp/in
  ctr task exec --exec-id echo "$name" cat </run/tmp/in >/run/tmp/out
  assert_equal "$(sha256sum </run/tmp/in)" "$(sha256sum </run/tmp/out)"
  rm /run/tmp/in /run/tmp/out
  remove "$name"
}

end_of_stdin_reaches_the_process_after_the_last_byte() {
  new_name
  # ctr does not close an input that ends before the task is created.
  { wait_for_output ready && printf 'one\ntwo'; } | nutshell "$name" --rm -- sh -c 'echo ready; cat; echo; echo end' >/run/tmp/out
  assert_equal "ready one two end" "$(xargs </run/tmp/out)"
  rm /run/tmp/out
}

detach_of_a_client_does_not_close_stdin() {
  new_name
  mkfifo /run/tmp/in
  local in client word
  exec {in}<>/run/tmp/in
  nutshell "$name" -d -- sh -c 'while read -r line; do echo "got $line"; done; echo end' <&"$never"
  for word in one two; do
    ctr task attach "$name" <&"$in" >/run/tmp/out &
    client=$!
    echo "$word" >&"$in"
    wait_for_output "got $word"
    # SIGKILL: ctr forwards other signals to the task.
    kill -9 "$client"
    wait "$client" || true
    ! grep end /run/tmp/out || return 1
  done
  assert_contains "$(ctr task ls)" RUNNING
  exec {in}>&-
  rm /run/tmp/in /run/tmp/out
  remove "$name"
}

# The output of a detached container has no reader: the container can write only a limited amount, and its end takes a
# limited time.
client_that_does_not_read_blocks_the_process() {
  new_name
  nutshell "$name" -d -- sh -c 'text=$(head -c 1023 /dev/zero | tr "\0" x); count=0
    while echo "$text"; do count=$((count + 1)); echo "$count" >/dev/shm/count; done'
  local try before='' after='' from
  for try in {1..50}; do
    before=$after
    after=$(ctr task exec --exec-id "count$try" "$name" cat /dev/shm/count 2>/dev/null) || after=
    [[ -z $after || $after != "$before" ]] || break
  done
  [[ -n $after && $after == "$before" ]]
  ((after > 63 && after < 1024)) || { echo "$after KiB were accepted" >&2; return 1; }
  from=$SECONDS
  ctr task kill --signal SIGKILL "$name"
  wait_for_task "$name" STOPPED
  assert_contains "$(ctr task delete "$name" 2>&1)" "exit code 137"
  ((SECONDS - from <= 30)) || { echo "its end took $((SECONDS - from)) s" >&2; return 1; }
  ctr container delete "$name"
}

grandchild_that_keeps_stdout_open_does_not_delay_the_exit() {
  new_name
  nutshell "$name" -d -- sh -c 'mkfifo /dev/shm/go; sleep 1000'
  listen "$name"
  ctr task exec --exec-id parent "$name" sh -c '(read -r line </dev/shm/go; echo later) & echo first' >/run/tmp/exec.out &
  local client=$!
  wait_for_output '/tasks/exit.*"id":"parent"'
  # ctr now deletes the exec, which waits a limited time for the rest of the output.
  ctr task exec --exec-id go "$name" sh -c 'echo >/dev/shm/go'
  wait "$client"
  assert_equal "first later" "$(xargs </run/tmp/exec.out)"
  kill "$listener"
  wait "$listener" || true
  rm /run/tmp/out /run/tmp/exec.out
  remove "$name"
}

# on_terminal COMMAND: starts a container on the terminal of a script(1) in the background; descriptor $in writes to the
# terminal. After the container's output the script prints its status, and then waits for a line of input: without
# that, script(1) would give the terminal only 10 ms to pass on the rest of its output, too little on a busy machine.
on_terminal() {
  mkfifo /run/tmp/in
  exec {in}<>/run/tmp/in
  script -qec "ctr run --rm --tty --snapshotter $snapshotter --runtime $runtime localhost/$image:latest $name \
    sh -c '$1'; echo status \$?; read -r line" /dev/null <&"$in" >/run/tmp/out &
  client=$!
}

# end_of_terminal STATUS: waits for the end of the container of on_terminal. Its output is then in /run/tmp/out.
end_of_terminal() {
  wait_for_output "^status $1"
  echo >&"$in"
  assert_status 0 wait "$client"
  exec {in}>&-
  rm /run/tmp/in
}

terminal_is_resized_and_interrupted() {
  new_name
  local in client file pts=
  on_terminal 'trap "stty size" WINCH; trap "echo interrupted; exit 5" INT; echo ready; while :; do read -r line; done'
  wait_for_output ready
  for file in /proc/[0-9]*/fd/0; do
    [[ $(readlink "$file") != /dev/pts/* ]] || pts=$(readlink "$file")
  done
  stty -F "$pts" rows 33 cols 99
  wait_for_output "33 99"
  printf '\003' >&"$in"
  wait_for_output interrupted
  end_of_terminal 5
  rm /run/tmp/out
}

output_just_before_the_exit_arrives_on_a_terminal() {
  new_name
  local in client
  on_terminal 'seq 100000'
  end_of_terminal 0
  assert_equal "$(seq 100000 | sha256sum)" "$(tr -d '\r' </run/tmp/out | sed '/^status 0/,$d' | sha256sum)"
  rm /run/tmp/out
}

stream_cases() {
  check "logging program gets both streams and its arguments" logging_program_gets_both_streams_and_its_arguments
  check "logging program of an exec gets its streams" logging_program_of_an_exec_gets_its_streams
  check "failure of the logging program fails the create" \
    failure_of_the_logging_program_fails_the_create
  check "log file gets both streams" log_file_gets_both_streams
  check "output written just before the exit arrives in full" output_just_before_the_exit_arrives_in_full
  check "exec's output written just before the exit arrives in full and its input is unchanged" \
    output_of_an_exec_just_before_its_exit_arrives_in_full
  check "end of stdin reaches the process after the last byte" end_of_stdin_reaches_the_process_after_the_last_byte
  check "detach of a client does not close stdin" detach_of_a_client_does_not_close_stdin
  check "client that does not read blocks the process, which can still be killed" client_that_does_not_read_blocks_the_process
  check "grandchild that keeps stdout open does not delay the exit" grandchild_that_keeps_stdout_open_does_not_delay_the_exit
  check "terminal is resized and interrupted" terminal_is_resized_and_interrupted
  check "output written just before the exit arrives on a terminal" output_just_before_the_exit_arrives_on_a_terminal
}
