//! The cases, one module for each topic. A case gets a runtime handler, creates its pods, and panics if it fails.
//!
//! Belongs here: the list of cases. Does not belong here: code that several cases use, which is in the modules of the
//! crate. Called by `main`.

mod disks;
mod distribution;
mod failures;
mod forward;
mod namespaces;
mod network;
mod pods;
mod resources;
mod streams;
mod vm_network;
mod vm_volumes;
mod vms;

use crate::pod::Handler;

type Case = fn(Handler);

macro_rules! cases {
    ($($module:ident: $($name:ident)*;)*) => {
        /// Every case with its name, `MODULE::FUNCTION`.
        pub(crate) const CASES: &[(&str, Case)] = &[
            $($((concat!(stringify!($module), "::", stringify!($name)), $module::$name as Case),)*)*
        ];
    };
}

cases! {
    pods: run_to_completion init_containers removal_in_any_order restart pod_without_a_running_container ephemeral_container
        restarted_containerd;
    namespaces: separate_processes shared_processes files_and_settings host_namespaces_are_refused;
    failures: failures_affect_one_container_only pod_without_overhead_runs_out_of_memory stop_sends_sigterm_first;
    streams: executed_commands probes logs terminals;
    forward: forwarded_ports fifty_connections;
    network: pods_reach_each_other_and_the_host names_are_resolved host_ports;
    resources: statistics cgroup_of_both_drivers updated_limits machine_resize growth_under_load;
    disks: attach_and_detach;
    vms: machine_has_the_pods_network_and_volumes machine_runs_execs_by_its_agent machine_follows_its_memory_limit
        machine_restarts_in_its_pod machine_beside_a_sidecar_is_refused files_are_copied_in_both_directions
        memory_that_the_guest_leaves_offline_fails_the_update;
    vm_network: routed_machine_is_reached_directly_and_through_a_service;
    vm_volumes: volumes_of_a_pod_are_disks disk_belongs_to_one_pod_at_a_time init_container_prepares_the_boot_disk;
    distribution: image_boots_with_a_seed persistent_root_moves_to_another_pod;
}
