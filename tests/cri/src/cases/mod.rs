//! The cases, by what they look at. Each takes a runtime handler, makes its pods, and fails by panic.

mod disks;
mod failures;
mod forward;
mod namespaces;
mod network;
mod pods;
mod resources;
mod streams;

use crate::pod::Handler;

/// A case.
type Case = fn(Handler);

macro_rules! cases {
    ($($module:ident: $($name:ident)*;)*) => {
        /// Every case by its name.
        pub(crate) const CASES: &[(&str, Case)] = &[
            $($((concat!(stringify!($module), "::", stringify!($name)), $module::$name as Case),)*)*
        ];
    };
}

cases! {
    pods: pod_of_one init_containers pod_of_five restart pod_without_a_running_container ephemeral_container
        restarted_containerd;
    namespaces: processes_apart processes_together files_and_settings host_namespaces_are_refused;
    failures: end_of_one_leaves_the_others pod_without_overhead_runs_out_of_memory stop_is_graceful_first;
    streams: executed_commands probes logs terminals;
    forward: forwarded_ports fifty_at_once;
    network: pods_reach_each_other_and_the_host names_are_resolved host_ports;
    resources: statistics group_of_both_drivers updated_limits resize_up growth_under_load;
    disks: come_and_go;
}
