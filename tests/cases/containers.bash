# Single containers, on the containerd that the suite has started. Sourced by tests/suites/*.sh, after
# tests/lab/test.bash.
#
# The cases use the snapshotter $snapshotter and the image localhost/$image.

cases=$(dirname "${BASH_SOURCE[0]}")
snapshotter=overlayfs
image=busybox
serial=0

# nutshell NAME [CTR-OPTION...] -- COMMAND...: runs a new container with `ctr run`.
nutshell() {
  local name=$1 options=()
  shift
  while [[ $1 != -- ]]; do
    options+=("$1")
    shift
  done
  shift
  ctr run --snapshotter "$snapshotter" --runtime "$runtime" "${options[@]}" "localhost/$image:latest" "$name" "$@"
}

# Sets $name to a container name that no other case uses.
new_name() {
  serial=$((serial + 1))
  name=case-$BASHPID-$serial
}

# wait_for_task NAME STATUS: waits until `ctr task ls` shows this status. Limited to 100 tries.
wait_for_task() {
  local try
  for try in {1..100}; do
    [[ $(ctr task ls) != *"$1"*"$2"* ]] || return 0
    read -r -t 0.1 -u "$never" || true
  done
  echo "$1 is not $2:" >&2
  ctr task ls >&2
  return 1
}

# pids_of shim|vmm|fs: prints the pids of these processes of nutshell.
pids_of() {
  local stat pid rest name
  case $1 in
    shim) name=containerd-shim ;;
    *) name=nutshell-$1 ;;
  esac
  for stat in /proc/[0-9]*/stat; do
    { read -r pid rest <"$stat"; } 2>/dev/null || continue
    [[ $rest != "($name"* ]] || echo "$pid"
  done
}

# remove NAME: deletes a task, in any state, and its container.
remove() {
  ctr task delete --force "$1" >/dev/null 2>&1 || true
  ctr container delete "$1"
}

uname_reports_the_guests_kernel() {
  new_name
  local release
  release=$(nutshell "$name" --rm -- uname -r)
  assert_contains "$release" nutshell
}

stdout_and_stderr_stay_apart() {
  new_name
  nutshell "$name" --rm -- sh -c 'echo out; echo err >&2' >/run/tmp/out 2>/run/tmp/err
  assert_equal out "$(</run/tmp/out)"
  assert_equal err "$(</run/tmp/err)"
  rm /run/tmp/out /run/tmp/err
}

exit_status_is_exact() {
  local status
  for status in 0 1 42 127 255; do
    new_name
    assert_status "$status" nutshell "$name" --rm -- sh -c "exit $status"
  done
}

killed_init_reports_137() {
  new_name
  assert_status 137 nutshell "$name" --rm -- sh -c 'kill -9 $$; (kill -9 1); sleep 1000' &
  local client=$!
  wait_for_task "$name" RUNNING
  ctr task kill --signal SIGKILL "$name"
  wait "$client"
}

terminated_init_reports_143() {
  new_name
  nutshell "$name" --rm -- sh -c 'trap "exit 143" TERM; echo ready; while :; do sleep 1; done' >/run/tmp/out &
  local client=$!
  wait_for_output ready
  ctr task kill --signal SIGTERM "$name"
  assert_status 143 wait "$client"
  rm /run/tmp/out
}

# wait_for_output PATTERN: waits until /run/tmp/out has a line that matches.
wait_for_output() {
  local try
  for try in {1..300}; do
    ! grep -q -- "$1" /run/tmp/out 2>/dev/null || return 0
    read -r -t 0.1 -u "$never" || true
  done
  echo "no '$1' in the output:" >&2
  cat /run/tmp/out >&2
  return 1
}

detached_container_can_be_listed_entered_killed_and_deleted() {
  new_name
  nutshell "$name" -d -- sleep 1000
  assert_contains "$(ctr task ls)" RUNNING
  assert_contains "$(ctr task ps "$name")" PID
  assert_equal "inside as 0" "$(ctr task exec --exec-id one "$name" sh -c 'echo inside as $(id -u)')"
  assert_status 7 ctr task exec --exec-id two "$name" sh -c 'exit 7'
  ctr task kill --signal SIGKILL "$name"
  wait_for_task "$name" STOPPED
  # ctr prints the exit status of the task and exits with 0.
  assert_contains "$(ctr task delete "$name" 2>&1)" "exit code 137"
  ctr container delete "$name"
}

exec_killed_by_a_signal_reports_128_plus_its_number() {
  new_name
  nutshell "$name" -d -- sleep 1000
  assert_status 143 ctr task exec --exec-id term "$name" sh -c 'kill -TERM $$'
  assert_status 137 ctr task exec --exec-id kill "$name" sh -c 'kill -KILL $$'
  remove "$name"
}

missing_command_fails_with_runcs_error_text() {
  new_name
  local output
  ! output=$(nutshell "$name" --rm -- no-such-command 2>&1) || return 1
  assert_contains "$output" 'exec: "no-such-command": executable file not found in $PATH'
  new_name
  ! output=$(nutshell "$name" --rm -- /no/such/command 2>&1) || return 1
  assert_contains "$output" 'exec: "/no/such/command": stat /no/such/command: no such file or directory'
  new_name
  nutshell "$name" -d -- sleep 1000
  ! output=$(ctr task exec --exec-id one "$name" no-such-command 2>&1) || return 1
  assert_contains "$output" 'exec: "no-such-command": executable file not found in $PATH'
  remove "$name"
}

process_with_a_terminal_has_a_tty_on_all_streams() {
  new_name
  # ctr needs a terminal, which script(1) provides.
  script -qec "ctr run --rm --tty --snapshotter $snapshotter --runtime $runtime localhost/$image:latest $name \
    sh -c 'test -t 0 && test -t 1 && test -t 2 && stty size && tty'" /dev/null </dev/null >/run/tmp/out
  assert_contains "$(</run/tmp/out)" /dev/pts/
  rm /run/tmp/out
}

stdin_and_stdout_arrive_unchanged() {
  new_name
  head -c $((100 << 20)) /dev/urandom >/run/tmp/in
  nutshell "$name" --rm -- cat </run/tmp/in >/run/tmp/out
  assert_equal "$(sha256sum </run/tmp/in)" "$(sha256sum </run/tmp/out)"
  rm /run/tmp/in /run/tmp/out
}

twenty_containers_start_concurrently() {
  local number clients=() failed=0
  for number in {1..20}; do
    nutshell "together-$BASHPID-$number" --rm -- sh -c "echo $number; exit $number" >"/run/tmp/out.$number" 2>&1 &
    clients+=($!)
  done
  for number in {1..20}; do
    assert_status "$number" wait "${clients[number - 1]}" || failed=1
    assert_equal "$number" "$(<"/run/tmp/out.$number")" || failed=1
    rm "/run/tmp/out.$number"
  done
  return "$failed"
}

settings_of_ctr_run_apply_to_the_process() {
  new_name
  local output
  output=$(nutshell "$name" --rm --env A=b --cwd /tmp --user 1234:5678 --hostname shell --read-only \
    --memory-limit $((64 << 20)) --mount type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro -- sh -c \
    'echo $A $(pwd) $(id -u):$(id -g) $(hostname); touch /x 2>&1; cat /sys/fs/cgroup/*/memory.max')
  assert_contains "$output" "b /tmp 1234:5678 shell"
  assert_contains "$output" "Read-only file system"
  assert_contains "$output" "$((64 << 20))"
}

vmm_and_fs_processes_are_confined() {
  new_name
  nutshell "$name" -d -- sleep 1000
  local shim vmm fs
  shim=$(pids_of shim) vmm=$(pids_of vmm) fs=$(pids_of fs)
  local pid line
  for pid in $vmm $fs; do
    local uid capabilities
    uid=$(awk '/^Uid:/ { print $2 }' "/proc/$pid/status")
    ((uid > 65535)) || { echo "process $pid runs as uid $uid" >&2; return 1; }
    [[ $(readlink "/proc/$pid/ns/mnt") != "$(readlink /proc/self/ns/mnt)" ]]
    [[ $(readlink "/proc/$pid/ns/net") != "$(readlink /proc/self/ns/net)" ]]
    assert_equal 1 "$(awk '/^NoNewPrivs:/ { print $2 }' "/proc/$pid/status")"
    while read -r line; do
      case $pid:$line in
        "$fs":CapPrm:* | "$fs":CapEff:*)
          # CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, SETFCAP.
          capabilities=$((0x${line##*[[:space:]]}))
          ((capabilities == (1 << 0 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 31))) || { echo "fs: $line" >&2; return 1; }
          ;;
        *) assert_equal 0 "$((0x${line##*[[:space:]]}))" ;;
      esac
    done < <(grep '^Cap' "/proc/$pid/status")
  done
  [[ -n $shim && -n $vmm && -n $fs ]]
  # The memory of the guest, a file on a tmpfs of its own with huge pages: fs has mapped it, and could shrink it if it
  # were open.
  local memory=(-lname '/#*' -o -lname '*guest-memory*')
  [[ -n $(find "/proc/$vmm/fd" "${memory[@]}") && -z $(find "/proc/$fs/fd" "${memory[@]}") ]]
  (($(awk '/^ShmemPmdMapped:/ { print $2 }' "/proc/$vmm/smaps_rollup") > 0)) || { echo "no huge pages" >&2; return 1; }
  remove "$name"
}

# listen NAME: writes containerd's events to /run/tmp/out in the background and sets $listener to the process. Returns
# when events arrive: it changes a label of container NAME until it sees the event.
listen() {
  ctr events >/run/tmp/out &
  listener=$!
  local try
  for try in {1..50}; do
    ctr container label "$1" try="$try" >/dev/null
    ! grep -q containers/update /run/tmp/out || return 0
  done
  echo "no events arrive" >&2
  return 1
}

# killed_process_ends_the_container shim|vmm|fs
killed_process_ends_the_container() {
  new_name
  nutshell "$name" -d -- sleep 1000
  local pid
  pid=$(pids_of "$1")
  [[ -n $pid ]]
  listen "$name"
  kill -9 $pid
  wait_for_output "/tasks/exit.*\"id\":\"$name\".*\"exit_status\":137"
  kill "$listener"
  wait "$listener" || true
  assert_equal 1 "$(grep -c /tasks/exit /run/tmp/out)"
  rm /run/tmp/out
  remove "$name"
  # ctr removes its fifos when it deletes the task, and containerd has no task without a shim.
  [[ $1 != shim ]] || rm -r /run/containerd/fifo/*
}

# The end of PID 1, the agent, panics the guest's kernel as well.
guest_kernel_panic_ends_the_container() {
  new_name
  nutshell "$name" -d --privileged --memory-limit $((32 << 20)) -- \
    sh -c 'echo 2 >/proc/sys/vm/panic_on_oom && exec tail /dev/zero'
  wait_for_task "$name" STOPPED
  assert_contains "$(ctr task delete "$name" 2>&1)" "exit code 137"
  ctr container delete "$name"
}

# kernel_of CODE FILE: writes an ELF kernel with the machine code CODE, a string with perl's escapes.
kernel_of() {
  perl -e 'my $code = eval "\"$ARGV[0]\"";
    print pack("A4C12SSLQQQLSSSSSS", "\x7fELF", 2, 1, 1, (0) x 9, 2, 62, 1, 0x100000, 64, 0, 0, 64, 56, 1, 0, 0, 0),
      pack("LLQQQQQQ", 1, 7, 4096, 0x100000, 0x100000, length $code, length $code, 4096), "\0" x (4096 - 120), $code' "$1" >"$2"
}

# boot_fails KERNEL TEXT: asserts that a container with this guest kernel fails with an error that contains TEXT.
# Sets $took to the milliseconds until then.
boot_fails() {
  new_name
  printf '[guest]\nkernel = "%s"\n' "$1" >/run/tmp/nutshell.toml
  local output from=$EPOCHREALTIME to
  ! output=$(nutshell "$name" --rm --runtime-config-path /run/tmp/nutshell.toml -- true 2>&1) || return 1
  to=$EPOCHREALTIME
  took=$(((${to/./} - ${from/./}) / 1000))
  assert_contains "$output" "$2"
  rm /run/tmp/nutshell.toml
}

boot_failure_is_reported_with_its_cause() {
  boot_fails /run/tmp/no-such-file "/run/tmp/no-such-file"
  # This kernel fails at once: the time is that of ctr and containerd.
  local overhead=$took
  echo "no kernel" >/run/tmp/kernel
  boot_fails /run/tmp/kernel "neither an ELF vmlinux nor a bzImage"
  # ud2, then a jump to itself.
  kernel_of '\x0f\x0b' /run/tmp/kernel
  boot_fails /run/tmp/kernel "the guest reset itself"
  kernel_of '\xeb\xfe' /run/tmp/kernel
  boot_fails /run/tmp/kernel "did not become ready"
  ((took - overhead <= 10000)) || { echo "took $took ms, of which ctr and containerd took $overhead ms" >&2; return 1; }
  rm /run/tmp/kernel
}

# No limit is lower than the node's, whatever the size of the machine.
limits_of_the_node_hold_in_the_container() {
  new_name
  local limit value inside outside nr_open read global=(fs/{nr_open,file-max,aio-max-nr,mount-max,epoll/max_user_watches}
    fs/inotify/max_{user_watches,user_instances,queued_events} fs/pipe-{max-size,user-pages-soft}
    kernel/{pid_max,threads-max,pty/max} kernel/keys/{,root_}max{keys,bytes} vm/max_map_count
    user/max_{user_namespaces,inotify_watches} net/core/{r,w}mem_max net/ipv4/tcp_max_orphans)
  # Limits of IPC and network namespaces: a container of runc has the values of a new namespace.
  local of_namespaces=(kernel/msg{max,mnb,mni} kernel/shm{max,all,mni} fs/mqueue/{msg,queues}_max net/core/somaxconn
    net/ipv4/tcp_max_{syn_backlog,tw_buckets})
  nr_open=$(</proc/sys/fs/nr_open)
  echo 2500000 >/proc/sys/fs/nr_open
  inside=$(nutshell "$name" --rm --privileged --memory-limit $((96 << 20)) -- \
    sh -c 'ulimit -n 2000000 && ulimit -n; for limit in "$@"; do echo $limit $(cat /proc/sys/$limit); done' limits \
    "${global[@]}" "${of_namespaces[@]}")
  assert_equal 2000000 "$(head -n 1 <<<"$inside")"
  while read -r limit value; do
    read=(cat)
    [[ " ${of_namespaces[*]} " != *" $limit "* ]] || read=(unshare --ipc --net cat)
    outside=$("${read[@]}" "/proc/sys/$limit")
    # sort(1) compares the limits, because some are too large for the arithmetic of bash.
    [[ -n $value && -n $outside && "$(printf '%s\n' "$outside" "$value" | sort -n | head -n 1)" == "$outside" ]] || {
      echo "$limit: $value in the container, $outside on the node" >&2
      return 1
    }
  done <<<"$(tail -n +2 <<<"$inside")"
  assert_equal $((1 + ${#global[@]} + ${#of_namespaces[@]})) "$(wc -l <<<"$inside")"
  echo "$nr_open" >/proc/sys/fs/nr_open
}

host_name_is_the_nodes() {
  new_name
  assert_equal "$(uname -n)" "$(nutshell "$name" --rm -- hostname)"
}

tmpfs_has_the_mode_of_its_folder() {
  new_name
  assert_equal "755 1777" "$(nutshell "$name" --rm --mount type=tmpfs,src=tmpfs,dst=/root,options=nosuid \
    --mount type=tmpfs,src=tmpfs,dst=/new,options=nosuid -- sh -c 'echo $(stat -c %a /root /new)')"
}

# `ro` applies to the mount of the source, `rro` also to mounts below it. Kubernetes asks for `ro` unless a pod sets
# recursiveReadOnly.
mounts_below_a_read_only_mount_stay_writable() {
  local option
  mkdir -p /run/tmp/volume/below
  mount -t tmpfs tmpfs /run/tmp/volume/below
  for option in ro rro; do
    new_name
    nutshell "$name" --rm --mount "type=bind,src=/run/tmp/volume,dst=/volume,options=rbind:rprivate:$option" -- \
      sh -c "touch /volume/$option; touch /volume/below/$option" >/run/tmp/out 2>&1 || true
    assert_contains "$(</run/tmp/out)" "/volume/$option: Read-only file system"
  done
  assert_contains "$(</run/tmp/out)" "/volume/below/rro: Read-only file system"
  assert_equal ro "$(ls /run/tmp/volume/below)"
  umount /run/tmp/volume/below
  rm -r /run/tmp/volume /run/tmp/out
}

# A new file takes the name of one that the guest has just looked up, and that it may know for 50 ms (src/fs/node_id.rs).
file_that_the_host_replaces_in_a_volume_is_seen_within_100_ms() {
  new_name
  local try
  mkdir /run/tmp/volume
  echo first >/run/tmp/volume/file
  echo second >/run/tmp/volume/new
  nutshell "$name" -d --mount type=bind,src=/run/tmp/volume,dst=/volume,options=rbind:rprivate -- sh -c '
    cd /volume
    until [ -e replaced ]; do cat file >seen; done
    usleep 100000
    cat file >last'
  for try in {1..100}; do
    [[ ! -s /run/tmp/volume/seen ]] || break
    read -r -t 0.1 -u "$never" || true
  done
  mv /run/tmp/volume/new /run/tmp/volume/file
  touch /run/tmp/volume/replaced
  wait_for_task "$name" STOPPED
  assert_equal second "$(</run/tmp/volume/last)"
  remove "$name"
  rm -r /run/tmp/volume
}

later_mounts_of_the_host_are_refused() {
  new_name
  mkdir /run/tmp/volume
  local status=0
  nutshell "$name" --rm --mount type=bind,src=/run/tmp/volume,dst=/volume,options=rbind:rslave -- true \
    2>/run/tmp/err || status=$?
  ((status != 0))
  assert_contains "$(</run/tmp/err)" 'mount /volume: mounts that the host makes later do not appear in a machine'
  rm -r /run/tmp/volume /run/tmp/err
}

# Programs such as `nerdctl cp` look for a container's files at /proc/<pid>/root.
pid_of_a_container_shows_no_files_of_the_host() {
  new_name
  nutshell "$name" -d -- sleep 1000
  local pid
  pid=$(ctr task ls | awk -v name="$name" '$1 == name { print $2 }')
  assert_equal "" "$(ls -A "/proc/$pid/root/")"
  ! echo text >"/proc/$pid/root/file" || return 1
  remove "$name"
}

administrator_sees_the_container() {
  new_name
  nutshell "$name" -d -- sleep 1000
  local listed inspected
  listed=$(containerd-shim-nutshell-v2 ps)
  assert_contains "$listed" "NAMESPACE"
  assert_contains "$(grep -o "default *$name *container *running" <<<"$listed")" "$name"
  inspected=$(containerd-shim-nutshell-v2 inspect "$name")
  echo "$inspected"
  assert_contains "$inspected" "guest kernel:     $(ctr task exec --exec-id uname "$name" uname -r)"
  assert_contains "$inspected" "vmm:              $(pids_of vmm)"
  grep -q '^agent ready:  *[0-9]* ms$' <<<"$inspected"
  grep -q '^started:  *[0-9]* ms$' <<<"$inspected"
  assert_contains "$(containerd-shim-nutshell-v2 inspect "default/$name" --json)" '"state": "running"'
  containerd-shim-nutshell-v2 console "$name"
  assert_contains "$(containerd-shim-nutshell-v2 metrics)" "nutshell_container_running{namespace=\"default\",id=\"$name\""
  remove "$name"
  assert_equal 1 "$(containerd-shim-nutshell-v2 ps | wc -l)"
  ! containerd-shim-nutshell-v2 inspect "$name" 2>/dev/null || return 1
}

administrator_opens_a_shell_in_the_guest() {
  new_name
  nutshell "$name" -d -- sleep 1000
  local output status=0
  output=$(echo 'uname -r; ls /run/nutshell/containers; cat >/run/file; exit 7' |
    containerd-shim-nutshell-v2 shell "$name") || status=$?
  assert_equal 7 "$status"
  assert_equal "$(ctr task exec --exec-id uname "$name" uname -r) $name" "$(echo $output)"
  # On a terminal, which script(1) provides. The container is unaffected by what the shell leaves behind.
  script -qec "stty columns 99 rows 44; containerd-shim-nutshell-v2 shell default/$name; echo status \$?" /dev/null \
    <<<'stty size; tty; sleep 1000 & exit 3' >/run/tmp/out
  assert_contains "$(</run/tmp/out)" "44 99"
  assert_contains "$(</run/tmp/out)" "/dev/pts/"
  assert_contains "$(</run/tmp/out)" "status 3"
  # A shell ends with its client, and with its container.
  containerd-shim-nutshell-v2 shell "$name" <&"$never" &
  local client=$!
  remove "$name"
  status=0
  wait "$client" || status=$?
  assert_equal 1 "$status"
  echo '[guest]
    shell = false' >/run/tmp/nutshell.toml
  new_name
  nutshell "$name" -d --runtime-config-path /run/tmp/nutshell.toml -- sleep 1000
  output=$(containerd-shim-nutshell-v2 shell "$name" 2>&1 </dev/null) && return 1
  assert_contains "$output" "shells are disabled"
  remove "$name"
  rm /run/tmp/out /run/tmp/nutshell.toml
}

machine_has_the_oom_score_of_its_container() {
  new_name
  nutshell "$name" -d -- sleep 1000
  assert_equal "0 0" "$(echo $(cat "/proc/$(pids_of vmm)/oom_score_adj" "/proc/$(pids_of fs)/oom_score_adj"))"
  remove "$name"
}

# Python needs a dynamic linker, threads, entropy and files.
python_runs() {
  new_name
  assert_equal "6 16 1" "$(nutshell "$name" --rm -- python3 -c '
import os, pathlib, threading
results = []
threads = [threading.Thread(target=results.append, args=[number]) for number in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(sum(results), len(os.urandom(16)), pathlib.Path("/tmp/x").write_text("y"))')"
}

# Sockets, locks and mappings belong to an inode, which has to be the same below both paths.
folder_at_two_paths_has_the_same_files_in_both() {
  new_name
  mkdir /run/tmp/volume
  local mount=type=bind,src=/run/tmp/volume,options=rbind:rprivate
  nutshell "$name" -d --mount "$mount,dst=/a" --mount "$mount:ro,dst=/read-only" --mount "$mount,dst=/b" -- sleep 1000
  ctr task exec --exec-id files "$name" python3 -c '
import fcntl, os, socket

def connect(path):
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)

assert os.stat("/a").st_ino == os.stat("/b").st_ino
# A server that starts again replaces its socket.
for start in range(2):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("/a/socket")
        server.listen()
        connect("/b/socket")
        connect("/read-only/socket")
    os.unlink("/a/socket")

lock, other = open("/a/lock", "w"), open("/b/lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
try:
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    raise SystemExit("both have the lock")
except BlockingIOError:
    pass

os.mkfifo("/a/fifo")
reader = os.open("/a/fifo", os.O_RDONLY | os.O_NONBLOCK)
os.write(os.open("/b/fifo", os.O_WRONLY), b"text")
assert os.read(reader, 4) == b"text"
'
  ctr task exec --exec-id database "$name" sh -euc '
    sqlite3 /a/db "pragma journal_mode=wal; create table numbers (number)" >/dev/null
    insert() {
      for number in $(seq 25); do sqlite3 -cmd ".timeout 60000" "$1" "insert into numbers values ($number)"; done
    }
    for path in /a/db /b/db /a/db /b/db; do insert $path & writers="${writers:-} $!"; done
    for writer in $writers; do wait $writer; done
    sqlite3 /b/db "pragma integrity_check; select count(*) from numbers"' >/run/tmp/out
  assert_equal $'ok\n100' "$(</run/tmp/out)"
  remove "$name"
  rm -r /run/tmp/volume /run/tmp/out
}

guest_kernel_has_the_documented_features() {
  new_name
  { cat "$cases/guest-kernel.pl" "$cases/../../docs/GUEST_KERNEL.md" && echo "## End"; } |
    nutshell "$name" --rm --privileged -- perl -
}

single_binary_runs() {
  new_name
  assert_status 42 nutshell "$name" --rm -- /one-binary 42 a b >/run/tmp/out
  assert_equal $'a\nb' "$(</run/tmp/out)"
  rm /run/tmp/out
}

# basic_cases LABEL: cases for each snapshotter and image.
basic_cases() {
  check "$1: uname reports the guest's kernel" uname_reports_the_guests_kernel
  check "$1: stdout and stderr stay apart" stdout_and_stderr_stay_apart
  check "$1: exit status is exact" exit_status_is_exact
  check "$1: killed init reports 137" killed_init_reports_137
  check "$1: terminated init reports 143" terminated_init_reports_143
  check "$1: detached container can be listed, entered by exec, killed and deleted" \
    detached_container_can_be_listed_entered_killed_and_deleted
}

# Every case, on each snapshotter that needs no setup, with a busybox image, a Debian image, and an image of one
# program. The second snapshotter and the second image are used together; separate_cases has each of them alone.
every_case() {
  basic_cases "overlayfs"
  check "overlayfs: exec killed by a signal reports 128 plus the signal's number" \
    exec_killed_by_a_signal_reports_128_plus_its_number
  check "overlayfs: missing command fails with runc's error text" missing_command_fails_with_runcs_error_text
  check "overlayfs: settings of ctr run apply to the process" settings_of_ctr_run_apply_to_the_process
  check "process with a terminal has a tty on all streams" process_with_a_terminal_has_a_tty_on_all_streams
  check "100 MiB through stdin and stdout arrive unchanged" stdin_and_stdout_arrive_unchanged
  check "vmm and fs processes are confined" vmm_and_fs_processes_are_confined
  local process
  for process in shim vmm fs; do
    check "killed $process ends the container" killed_process_ends_the_container "$process"
  done
  check "limits of the node hold in the container" limits_of_the_node_hold_in_the_container
  check "host name is the node's" host_name_is_the_nodes
  check "tmpfs has the mode of its folder" tmpfs_has_the_mode_of_its_folder
  check "mounts below a read-only mount stay writable" mounts_below_a_read_only_mount_stay_writable
  check "file that the host replaces in a volume is seen within 100 ms" \
    file_that_the_host_replaces_in_a_volume_is_seen_within_100_ms
  check "later mounts of the host are refused" later_mounts_of_the_host_are_refused
  check "pid of a container shows no files of the host" pid_of_a_container_shows_no_files_of_the_host
  check "administrator sees the container" administrator_sees_the_container
  check "administrator opens a shell in the guest" administrator_opens_a_shell_in_the_guest
  check "machine has the oom_score_adj of its container" machine_has_the_oom_score_of_its_container
  check "guest kernel panic ends the container" guest_kernel_panic_ends_the_container
  check "boot failure is reported with its cause" boot_failure_is_reported_with_its_cause
  check "twenty containers start concurrently" twenty_containers_start_concurrently
  snapshotter=native image=debian
  basic_cases "debian, native"
  snapshotter=overlayfs image=debian
  check "python3 of the debian image runs" python_runs
  check "folder at two paths has the same files in both" folder_at_two_paths_has_the_same_files_in_both
  # The page describes the kernel of the container board.
  [[ -n ${NUTSHELL_TEST_PC_KERNEL:-} ]] ||
    check "guest kernel has the documented features" guest_kernel_has_the_documented_features
  snapshotter=overlayfs image=one-binary
  check "image with a single binary runs" single_binary_runs
}

separate_cases() {
  snapshotter=native image=busybox
  basic_cases "native"
  snapshotter=overlayfs image=debian
  basic_cases "debian"
}
