#!/usr/bin/env bash
# The lab itself: containerd runs containers with runc, so that failures of other suites are nutshell's, and `check`
# detects everything that a container may leave behind.
source "$(dirname "$0")/../lab/test.bash"

runc_reports_output_and_exit_status() {
  assert_equal hello "$(ctr run --rm localhost/busybox:latest runc echo hello)"
  assert_status 42 ctr run --rm localhost/busybox:latest runc sh -c 'exit 42'
  assert_equal $'a\nb' "$(ctr run --rm localhost/one-binary:latest runc /one-binary 0 a b)"
}

# leftover_is_detected CREATE REMOVE: command lines that create something on the host and remove it.
leftover_is_detected() {
  host_state /run/check.without
  eval "$1"
  host_state /run/check.with
  eval "$2"
  ! cmp -s /run/check.without /run/check.with
}

for version in 1.7 2.1; do
  set_up_containerd "$version" busybox one-binary
  check "containerd $version runs containers with runc" runc_reports_output_and_exit_status
  [[ $version == 2.1 ]] || remove_containerd
done

check "leftover process is detected" leftover_is_detected 'sleep 600 & child=$!' 'kill $child; wait $child || true'
check "leftover mount is detected" leftover_is_detected 'mount -t tmpfs none /tmp' 'umount /tmp'
check "leftover fifo is detected" leftover_is_detected 'mkfifo /run/containerd/s/x' 'rm /run/containerd/s/x'
check "leftover temporary file is detected" leftover_is_detected 'touch /tmp/x' 'rm /tmp/x'
check "leftover network link is detected" leftover_is_detected 'ip tuntap add tap0 mode tap' 'ip link del tap0'
check "leftover cgroup is detected" leftover_is_detected 'mkdir /sys/fs/cgroup/x' 'rmdir /sys/fs/cgroup/x'
check "leftover loop device is detected" leftover_is_detected \
  'truncate -s 1M /run/last; loop=$(losetup -f --show /run/last)' 'losetup -d $loop; rm /run/last'
finish
