# Pods as a kubelet creates them: life cycle, namespaces, failures, streams, network, resources. The cases are in
# tests/cri/src/cases. Sourced after lab/pods.bash.

# The cases that depend on the API by which the sandbox is created.
sandbox_cases() {
  pod "pod with one container runs it to completion" pods::run_to_completion
  pod "init containers run in sequence, then the other containers together" pods::init_containers
  pod "five containers of a pod can be removed in any order" pods::removal_in_any_order
  pod "container can be restarted under its name" pods::restart
  pod "pod without a running container stays ready until it is stopped" pods::pod_without_a_running_container
  pod "ephemeral container shares the processes of its target" pods::ephemeral_container
  pod "pod survives when containerd is killed" pods::restarted_containerd
  pod "containers share network, host name, /dev/shm and message queues, but not processes" namespaces::separate_processes
  pod "containers share processes with shareProcessNamespace" namespaces::shared_processes
  pod "containers have the pod's host name, DNS settings and sysctls" namespaces::files_and_settings
  [[ $handler == runc ]] ||
    pod "hostNetwork, hostPID and hostIPC are refused with the name of the field" namespaces::host_namespaces_are_refused
  pod "crash, kill, out of memory and a missing program affect one container only" failures::failures_affect_one_container_only
  pod "pod without overhead that runs out of memory loses a process and not its machine" failures::pod_without_overhead_runs_out_of_memory
  pod "stop sends SIGTERM before SIGKILL" failures::stop_sends_sigterm_first
  pod "execs report output, exit status and a missed deadline" streams::executed_commands
  pod "forwarded ports carry 10 MiB in both directions over IPv4 and IPv6" forward::forwarded_ports
  [[ $handler == runc ]] ||
    pod "machine is in the pod's cgroup with the cgroupfs and the systemd driver" resources::cgroup_of_both_drivers
}

# Every case. Those that are not in sandbox_cases test what is the same with both APIs once the sandbox has started.
pod_cases() {
  sandbox_cases
  pod "one probe a second does not grow the shim" streams::probes
  pod "logs are complete while they are rotated" streams::logs
  pod "clients can attach to streams and resize terminals" streams::terminals
  pod "fifty forwarded connections work concurrently" forward::fifty_connections
  pod "pods reach each other and the host by TCP, UDP and ICMP" network::pods_reach_each_other_and_the_host
  pod "names resolve with the pod's DNS settings" network::names_are_resolved
  pod "host ports reach the pod" network::host_ports
  pod "statistics match what was used" resources::statistics
  pod "limits of a running container can be changed" resources::updated_limits
  pod "machine grows and shrinks with the limits of its containers" resources::machine_resize
  [[ $handler == runc ]] ||
    pod "memory added during file I/O does not corrupt files" resources::growth_under_load
}

# With a runtime handler that gives each container a disk.
disk_cases() {
  pod "disks of containers are attached and detached while the pod runs" disks::attach_and_detach
  pod "memory added during file I/O does not corrupt files" resources::growth_under_load
}

# Run by CI, with the image vm-raw.
vm_cases() {
  pod "virtual machine has the pod's network and volumes" vms::machine_has_the_pods_network_and_volumes
  pod "virtual machine runs execs by its agent" vms::machine_runs_execs_by_its_agent
  pod "virtual machine follows its memory limit" vms::machine_follows_its_memory_limit
  pod "virtual machine restarts in its pod" vms::machine_restarts_in_its_pod
  pod "virtual machine beside a sidecar is refused" vms::machine_beside_a_sidecar_is_refused
  pod "volumes of a virtual machine's pod are disks" vm_volumes::volumes_of_a_pod_are_disks
}

# Left to `make soak`, with the image vm-raw.
soak_vm_cases() {
  handler=nutshell-routed pod "virtual machine without a subnet is reached directly and through a Service" \
    vm_network::routed_machine_is_reached_directly_and_through_a_service
  pod "init container prepares the boot disk" vm_volumes::init_container_prepares_the_boot_disk
  pod "disk belongs to one pod at a time" vm_volumes::disk_belongs_to_one_pod_at_a_time
  pod "files are copied into and out of a virtual machine" vms::files_are_copied_in_both_directions
  pod "memory that the guest leaves offline fails the update" vms::memory_that_the_guest_leaves_offline_fails_the_update
}

# With the image vm-debian.
distribution_cases() {
  pod "distribution boots with a seed" distribution::image_boots_with_a_seed
  pod "persistent root moves to another pod" distribution::persistent_root_moves_to_another_pod
}
