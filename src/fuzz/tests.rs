//! Replays the stored inputs of the fuzz targets.

use nutshell_fixtures::replay_corpus;

#[test]
fn stored_accesses_to_pci_devices_keep_their_state_consistent() {
    replay_corpus("pci", super::access_pci);
}

#[test]
fn stored_accesses_to_the_pc_board_have_bounded_effects() {
    replay_corpus("pc_board", super::access_pc_board);
}

#[test]
fn stored_dhcp_requests_have_valid_answers_or_none() {
    replay_corpus("dhcp", super::answer_request);
}

#[test]
fn stored_control_messages_leave_few_messages_for_the_driver() {
    replay_corpus("named_port", super::control_port);
}

#[test]
fn stored_replies_of_file_servers_are_checked() {
    replay_corpus("file_server", super::receive_replies);
}

#[test]
fn stored_kernels_are_loaded_into_guest_memory_or_refused() {
    replay_corpus("kernel", super::load_kernel);
}

#[test]
fn stored_answers_of_guest_agents_are_parsed_or_refused() {
    replay_corpus("guest_agent", super::receive_answers);
}

#[test]
fn stored_answers_of_disk_readers_are_checked() {
    replay_corpus("disk_kernel", super::receive_disk_kernel);
}

#[test]
fn stored_descriptor_chains_are_parsed_as_the_specification_says() {
    replay_corpus("virtio_chains", super::parse_chains);
}

#[test]
fn stored_accesses_to_mmio_registers_change_nothing_after_activation() {
    replay_corpus("virtio_mmio", super::access_registers);
}

#[test]
fn stored_requests_to_devices_keep_their_contracts() {
    replay_corpus("virtio_devices", super::serve_devices);
}

#[test]
fn stored_requests_to_disks_change_only_writable_sectors() {
    replay_corpus("virtio_block", super::serve_disk);
}

#[test]
fn stored_packets_to_network_devices_are_moved_or_dropped() {
    replay_corpus("virtio_net", super::move_packets);
}

#[test]
fn stored_packets_of_streams_lose_no_bytes() {
    replay_corpus("virtio_vsock", super::exchange_packets);
}

#[test]
fn stored_fuse_requests_stay_in_their_tree() {
    replay_corpus("files", super::serve_files);
}

#[test]
fn stored_messages_to_the_file_server_are_handled_or_end_the_connection() {
    replay_corpus("vhost_user", super::serve_vmm);
}

#[test]
fn stored_control_messages_are_decoded_or_refused() {
    replay_corpus("control_messages", super::receive_control_messages);
}

#[test]
fn stored_bundles_are_planned_or_refused() {
    replay_corpus("bundle", super::plan_bundle);
}

#[test]
fn stored_sandboxes_are_planned_or_refused() {
    replay_corpus("sandbox", super::plan_sandbox);
}

#[test]
fn stored_start_requests_are_parsed_or_refused() {
    replay_corpus("start_request", super::parse_start_request);
}
