#!/usr/bin/env bash
# Settings of the OCI spec, and the environment that users expect in a container, on containerd 2.1.
source "$(dirname "$0")/../lab/test.bash"
source "$(dirname "$0")/../cases/containers.bash"
source "$(dirname "$0")/../cases/spec.bash"
set_up_containerd 2.1 busybox debian
prepare_specs

check "host hooks run in order and receive the state" host_hooks_run_in_order_and_receive_the_state
check "failing host hook fails Create" failing_host_hook_fails_create
check "guest hooks run in the container" guest_hooks_run_in_the_container
check "failing guest hook fails Create or Start" failing_guest_hook_fails_create_or_start
check "process has the settings of the spec" process_has_the_settings_of_the_spec
check "terminal has the size of the spec" terminal_has_the_size_of_the_spec
check "cgroup and time namespaces of the spec are created" cgroup_and_time_namespaces_are_created
check "devices of the guest are available and others are refused" devices_of_the_guest_are_available_and_others_refused
check "user namespace maps root" user_namespace_maps_root
check "tmpfs has the files of its folder" tmpfs_has_the_files_of_its_folder
check "mounts are id-mapped" mounts_are_id_mapped
check "mount that cannot be id-mapped is named in the error" mount_that_cannot_be_id_mapped_is_named
check "unsupported fields are named in an error or a warning" unsupported_fields_are_named
check "machine has the requested CPUs and memory" machine_has_the_requested_cpus_and_memory
check "/dev/shm has the requested size" dev_shm_has_the_requested_size
check "kernel log requires CAP_SYSLOG" kernel_log_requires_cap_syslog
check "orphans are reaped" orphans_are_reaped
check "oom event precedes the exit of the killed container" oom_event_precedes_the_exit
check "process that uses all memory of the machine is killed alone" process_that_uses_all_memory_is_killed_alone
check "metrics are complete" metrics_are_complete
check "directory in memory is emptied while it is read" directory_in_memory_is_emptied_while_it_is_read
check "root file system keeps file capabilities until a write" root_file_system_keeps_file_capabilities_until_a_write
check "creation of files causes few exits" creation_of_files_causes_few_exits
check "volume behaves as a local file system but for the known limits" \
  volume_behaves_as_a_local_file_system_but_for_the_known_limits
image=debian
check "guest clock follows the host's clock" guest_clock_follows_the_hosts_clock
check "guest clock follows slews of the host's clock" guest_clock_follows_slews_of_the_hosts_clock
check "entropy is available at once" entropy_is_available_at_once
check "user and group names resolve and a missing locale is no error" names_resolve_and_a_missing_locale_is_no_error
finish
