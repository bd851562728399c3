#!/usr/bin/env bash
# What an OCI spec asks for and what users expect inside, on containerd 2.1.
source "$(dirname "$0")/../lab/test.bash"
source "$(dirname "$0")/../cases/containers.bash"
source "$(dirname "$0")/../cases/spec.bash"
start_containerd 2.1 busybox debian
prepare_specs

check "hooks of the host run in order with the state" host_hooks_run_in_order_with_the_state
check "failing hook of the host is the error of Create" failing_host_hook_is_the_error_of_create
check "hooks of the guest run in the container" guest_hooks_run_in_the_container
check "failing hook of the guest is the error of Create or Start" failing_guest_hook_is_the_error_of_create_or_start
check "process has the settings of the spec" process_has_the_settings_of_the_spec
check "terminal has the size of the spec" terminal_has_the_size_of_the_spec
check "namespaces of the spec are new" namespaces_of_the_spec_are_new
check "devices of the guest are there and others refused" devices_of_the_guest_are_there_and_others_refused
check "user namespace maps root" user_namespace_maps_root
check "mounts are id-mapped" mounts_are_id_mapped
check "id mapping that the file system cannot do is named" id_mapping_that_the_file_system_cannot_do_is_named
check "fields that cannot be honoured are named" fields_that_cannot_be_honoured_are_named
check "machine has the size that was asked for" machine_has_the_size_that_was_asked_for
check "shared memory has the size that was asked for" shared_memory_has_the_size_that_was_asked_for
check "kernel log needs the capability" kernel_log_needs_the_capability
check "orphans are reaped" orphans_are_reaped
check "memory hog is killed with an event before its exit" memory_hog_is_killed_with_an_event_before_its_exit
check "hog of all memory is killed and the others are not" hog_of_all_memory_is_killed_and_the_others_are_not
check "metrics are complete" metrics_are_complete
image=debian
check "clock is the host's" clock_is_the_hosts
check "entropy is there at once" entropy_is_there_at_once
check "programs of a distribution find names and no locale" programs_of_a_distribution_find_names_and_no_locale
finish
