#!/usr/bin/env bash
# The shim without a containerd: the test program of tests/conformance acts as containerd and checks the
# requirements in docs/CONFORMANCE.md.
#
# Environment:
#   NUTSHELL_TEST_DIRECT  the test program, set by tests/run (tests/conformance/build builds it)
#   NUTSHELL_TEST_EXECS   the number of execs while a container scans for their streams; default: 100
#   NUTSHELL_TEST_FILTER  runs only the tests whose name contains one of these words
source "$(dirname "$0")/../lab/test.bash"

cp "$NUTSHELL_TEST_DIRECT" /run/bin/direct
cp "$(dirname "$NUTSHELL_TEST_DIRECT")"/{eventfds,vsock-scanner} /run/bin/
cp "$NUTSHELL_TEST_SHIM" /run/bin/containerd-shim-nutshell-v2
export NUTSHELL_TEST_SHIM=/run/bin/containerd-shim-nutshell-v2
copy_to_memory sh
modprobe fuse
modprobe erofs
# As systemd does: a shim gets mounts that are made after its start.
mount --make-rshared /
# The shims of these tests have the default configuration.
rm /etc/nutshell/config.toml
# Folders that containerd or the administrator creates and never removes.
mkdir -p -m 700 /run/containerd/s
mkdir -p /sys/fs/cgroup/conformance /run/tmp/conformance

# Each test asserts that it leaves nothing. This asserts it once more for all of them together.
host_state /run/check.before
arguments=(--test-threads=2)
if [[ -n ${NUTSHELL_TEST_FILTER:-} ]]; then
  # shellcheck disable=SC2206 # several words
  arguments+=($NUTSHELL_TEST_FILTER)
else
  # The suite `leaks` runs these: they take minutes.
  arguments+=(--skip leaks::hundred_containers --skip leaks::thirty_concurrent)
fi
declare -A took
while read -r first second third fourth; do
  case $first in
    took) took[$fourth]=$second ;;
    test)
      [[ $third == ... ]] || continue
      name="$second (${took[$second]:-0} ms)"
      if [[ $fourth == ok ]]; then
        passed=$((passed + 1))
        echo "ok      $name"
      else
        failed=$((failed + 1))
        echo "FAILED  $name"
      fi
      ;;
  esac
done < <(
  direct "${arguments[@]}" 2>&1 | tee /run/check.log
  echo "${PIPESTATUS[0]}" >/run/check.status
)
status=$(</run/check.status)
rm -r /run/tmp/conformance/rootfs

((failed == 0)) || sed -n '/^failures:$/,$s/^/        /p' /run/check.log
if ((passed + failed == 0 || (status != 0 && failed == 0))); then
  failed=$((failed + 1))
  echo "FAILED  the program ended with status $status"
  tail -n 40 /run/check.log
fi
if assert_nothing_left /run/check.before; then
  passed=$((passed + 1))
  echo "ok      nothing is left on the host"
else
  failed=$((failed + 1))
  echo "FAILED  nothing is left on the host"
fi
finish
