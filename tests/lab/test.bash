# The test framework of suites: check, finish, assertions. Sourced by tests/suites/*.sh, which run in the lab
# machine (tests/run), and by tests/deploy.
#
#   source "$(dirname "$0")/../lab/test.bash"
#   set_up_containerd 2.1 busybox
#   exit_status_is_exact() { ... }
#   check "exit status is exact" exit_status_is_exact
#   finish

# Environment:
#   NUTSHELL_TEST_PC_KERNEL  runs all guests on the PC board with this kernel (guest/kernel/build --board pc)
#   NUTSHELL_TEST_SYSCALLS   a file to which tests/run adds the system calls of the confined processes

set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/containerd.bash"

if [[ -n ${NUTSHELL_TEST_SYSCALLS:-} ]]; then
  source "$(dirname "${BASH_SOURCE[0]}")/syscalls.bash"
  start_recording
fi

runtime=io.containerd.nutshell.v2
passed=0
failed=0

# Without a separate /tmp the one of the lab's host would be visible, and it changes during the tests.
case $lab:${NUTSHELL_CACHE:-}:${NUTSHELL_TEST_SHIM:-} in
  /tmp/* | *:/tmp/*) echo "project, cache or shim are in /tmp: files that tests leave there are not detected" ;;
  *) mount -t tmpfs -o mode=1777 tmpfs /tmp && tmp=/tmp ;;
esac
# The shim's debug log and the guest's console go to containerd's log.
mkdir -p /etc/nutshell
echo 'debug = true' >/etc/nutshell/config.toml
# The PC board needs a kernel with PCI. The copy is in the lab's memory, because reads over 9p are slow.
if [[ -n ${NUTSHELL_TEST_PC_KERNEL:-} ]]; then
  cp "$NUTSHELL_TEST_PC_KERNEL" /etc/nutshell/vmlinux-pc
  printf '[guest]\nboard = "pc"\nkernel = "/etc/nutshell/vmlinux-pc"\n' >>/etc/nutshell/config.toml
fi
# The mount command creates this folder and never removes it.
mkdir -p /run/mount

# host_state FILE: writes everything that a container can leave behind on the host, one sorted line each. Lists the
# processes before it starts any.
host_state() {
  local stat pid rest file containerd='' docker=''
  # containerd and dockerd may have been restarted.
  [[ ! -e /run/containerd.pid ]] || containerd=$(</run/containerd.pid)
  [[ ! -e /run/dockerd.pid ]] || docker=$(</run/dockerd.pid)
  {
    for stat in /proc/[0-9]*/stat; do
      # pid (name) state parent ...; 2 is the parent of kernel threads.
      { read -r pid rest <"$stat"; } 2>/dev/null || continue
      set -- "$1" ${rest##*) }
      [[ $pid == 2 || $3 == 2 || $pid == "$$" || $pid == "$containerd" || $pid == "$docker" ]] ||
        echo "process $pid ${rest%)*})"
    done
    while read -r _ _ _ rest; do echo "mount $rest"; done </proc/self/mountinfo
    for file in /sys/class/net/*; do echo "link ${file##*/}"; done
    for file in /sys/block/loop*/loop/backing_file /sys/block/dm-*; do [[ ! -e $file ]] || echo "device $file"; done
    find /sys/fs/cgroup -mindepth 1 -type d -printf 'cgroup %p\n'
    # Docker removes the files of its network namespaces once a minute. Those in use are in the list of mounts. A
    # daemon that is killed leaves its socket in libnetwork.
    find /run /dev/shm ${tmp:-} -mindepth 1 \( -path /run/containerd-root -o -path '/run/containerd.*' \
      -o -path /run/docker-root -o -path '/run/dockerd.*' -o -path '/run/docker/netns/*' \
      -o -path '/run/docker/libnetwork/*' \
      -o -path '/run/check.*' -o -path /run/last \) -prune -o -printf 'file %p (%y)\n'
  } >/run/check.state
  sort -o "$1" /run/check.state
}

# assert_nothing_left BEFORE: fails if the host has anything that is not in BEFORE, a file of host_state. Retries for
# 10 s: containerd ends a shim after it has answered its client, and sends no event about that.
assert_nothing_left() {
  local deadline=$((SECONDS + 10))
  while
    host_state /run/check.after
    comm -13 "$1" /run/check.after >/run/check.left
    [[ -s /run/check.left ]]
  do
    ((SECONDS < deadline)) || {
      sed '1i left behind:' /run/check.left
      return 1
    }
    read -r -t 0.2 -u "$never" || true
  done
}

# check NAME COMMAND [ARG...]: runs a test, usually a function, with errexit, and then asserts that nothing is left
# on the host. Prints one line; if the test failed, also its output and containerd's log.
check() {
  local name=$1 status=0 from=$EPOCHREALTIME to milliseconds logged
  shift
  host_state /run/check.before
  logged=$(stat -c %s /run/containerd.log)
  (
    set -e
    "$@"
  ) >/run/check.log 2>&1
  status=$?
  assert_nothing_left /run/check.before >>/run/check.log 2>&1 || status=1
  to=$EPOCHREALTIME
  milliseconds=$(((${to/./} - ${from/./}) / 1000))
  if ((status == 0)); then
    passed=$((passed + 1))
    echo "ok      $name ($milliseconds ms)"
  else
    failed=$((failed + 1))
    echo "FAILED  $name ($milliseconds ms, status $status)"
    sed 's/^/        /' /run/check.log
    tail -c "+$((logged + 1))" /run/containerd.log | tail -n 80 | cut -c1-600 | sed 's/^/        containerd: /'
  fi
}

# finish: reports the result to tests/run. The last command of every suite.
finish() {
  remove_containerd
  [[ -z ${NUTSHELL_TEST_SYSCALLS:-} ]] || sorted_record >/out/syscalls
  echo "$passed $failed" >/out/result
  exit $((failed > 0))
}

# assert_equal EXPECTED ACTUAL
assert_equal() {
  [[ $1 == "$2" ]] || {
    printf 'expected: %s\n  actual: %s\n' "$1" "$2" >&2
    return 1
  }
}

# assert_contains TEXT PART
assert_contains() {
  [[ $1 == *"$2"* ]] || {
    printf 'not found: %s\n       in: %s\n' "$2" "$1" >&2
    return 1
  }
}

# assert_status EXPECTED COMMAND...: runs it and compares its exit status.
assert_status() {
  local expected=$1 status=0
  shift
  "$@" || status=$?
  ((status == expected)) || {
    echo "expected status $expected, got $status: $*" >&2
    return 1
  }
}

# assert_system_call_lists THREAD...: checks that the processes of nutshell have these threads among others, and that
# each thread of theirs is limited by the list of its process, by that of the thread that started it if this has one,
# and by its own. (The kernel shows only how many lists apply.)
assert_system_call_lists() {
  local stat process status name expected count seen=' '
  for stat in /proc/[0-9]*/task/*/status; do
    status=$(cat "$stat" 2>/dev/null) || continue
    process=$(cat "${stat%/task/*}/comm" 2>/dev/null) || continue
    [[ $process == nutshell-* ]] || continue
    name=$(sed -n 's/^Name:\t//p' <<<"$status")
    count=$(sed -n 's/^Seccomp_filters:\t//p' <<<"$status")
    case $process/$name in
      nutshell-holder/nutshell-holder | nutshell-fs/nutshell-fs | nutshell-fs/vhost-user) expected=1 ;;
      nutshell-vmm/nutshell-vmm | 'nutshell-vmm/disk sizes') expected=2 ;;
      nutshell-fs/vring_worker | nutshell-fs/standby) expected=2 ;;
      # Started by the event loop if it is added later.
      nutshell-vmm/vcpu\ *) expected='[23]' ;;
      nutshell-vmm/net | nutshell-vmm/block | nutshell-vmm/unplug | nutshell-fs/sync) expected=3 ;;
      *) echo "unknown thread $name of $process" >&2; return 1 ;;
    esac
    [[ $count == $expected ]] || { echo "thread $name of $process has $count lists of system calls" >&2; return 1; }
    seen+="${process#nutshell-}/$name "
  done
  for name; do
    [[ $seen == *" $name "* ]] || { echo "there is no thread $name:$seen" >&2; return 1; }
  done
}
