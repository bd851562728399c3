//! Virtual machines that boot a user's disk or kernel.

use std::time::{Duration, Instant};

use containerd_shim::protos::{
    api::{CreateTaskRequest, ResizePtyRequest, StartRequest, Status, UpdateTaskRequest},
    protobuf::well_known_types::any::Any,
    ttrpc::{Code, context},
};
use nutshell_protocol::Request;
use serde_json::{Value, json};

use super::{Shim, behaviour::Behaviour, error_of, open_reader, process_exists};
use crate::{control::EndReason, devices::log_capture::LogCapture, shim::stdio::read_next};

impl Shim {
    /// A request to create the virtual machine `id`, with a disk in its image.
    fn vm_request(&self, id: &str, annotations: Value) -> CreateTaskRequest {
        let request = CreateTaskRequest {
            rootfs: Vec::new(),
            ..self.request(id)
        };
        let bundle = self.folder.path().join(id);
        let disks = bundle.join("rootfs/disk");
        std::fs::create_dir_all(&disks).unwrap();
        std::fs::write(disks.join("disk.raw"), [0; 512]).unwrap();
        let config = bundle.join("config.json");
        let mut spec: Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
        spec["process"]["args"] = json!(["vm"]);
        spec["annotations"] = annotations;
        std::fs::write(config, spec.to_string()).unwrap();
        request
    }

    pub(super) async fn create_vm(&self, id: &str, annotations: Value) -> u32 {
        let request = self.vm_request(id, annotations);
        let created = self.task.create(context::Context::default(), &request).await;
        created.unwrap().pid
    }

    pub(super) async fn run_vm(&self, id: &str) -> u32 {
        let pid = self.create_vm(id, json!({})).await;
        assert_eq!(self.start_task(id, "").await.unwrap(), pid);
        pid
    }
}

#[tokio::test]
async fn kernel_of_the_disk_boots_and_power_off_is_exit_status_0() {
    let mut shim = Shim::start().await;
    let pid = shim
        .create_vm("v1", json!({"io.containerd.nutshell.vm.kernel-arguments": "quiet"}))
        .await;
    assert_eq!(shim.status("v1").await, Status::CREATED);
    let reader = open_reader(&shim, "v1");
    assert_eq!(shim.start_task("v1", "").await.unwrap(), pid);
    assert_eq!(
        shim.fake.user_boots(1).await,
        "\"panic=1\" root=/dev/vda1 console=ttyS0 quiet"
    );

    shim.kill("v1", "", 15).await.unwrap();

    assert_eq!(shim.wait("v1", "").await.unwrap(), 0);
    // The output has ended before the task is deleted.
    assert_eq!(read_next(&reader), b"");
    shim.delete("v1", "").await.unwrap();
    assert!(!process_exists(pid));
    assert_eq!(
        shim.next_events(4).await,
        ["create", "start", "exit v1 0", "delete v1 0"]
    );
    shim.assert_no_more_events().await;
}

/// The vmm of a created machine waits for the boot command, and ends if it gets any other command.
#[tokio::test]
async fn report_of_a_created_machine_does_not_end_it() {
    let shim = Shim::start().await;
    shim.create_vm("v1", json!({})).await;

    let report = shim.tasks.full_report().await;

    let error = report.containers[0].machine.devices_error.as_deref();
    assert_eq!(error, Some("the machine has not been started"));
    assert_eq!(shim.status("v1").await, Status::CREATED);
    shim.start_task("v1", "").await.unwrap();
    let report = shim.tasks.full_report().await;
    assert_eq!(report.containers[0].machine.devices_error, None);
    shim.kill("v1", "", 9).await.unwrap();
    shim.wait("v1", "").await.unwrap();
}

#[tokio::test]
async fn reset_boots_again_with_the_kernel_that_is_on_the_disk_then() {
    let mut shim = Shim::start().await;
    shim.run_vm("v1").await;
    for boot in 2..4 {
        shim.fake.end_guest(EndReason::GuestReset);
        shim.fake.user_boots(boot).await;
        assert_eq!(shim.status("v1").await, Status::RUNNING);
    }
    shim.fake.end_guest(EndReason::GuestPowerOff);
    assert_eq!(shim.wait("v1", "").await.unwrap(), 0);
    assert_eq!(shim.next_events(3).await, ["create", "start", "exit v1 0"]);
}

#[tokio::test]
async fn reset_ends_the_task_if_on_reboot_is_exit() {
    let shim = Shim::start().await;
    shim.create_vm("v1", json!({"io.containerd.nutshell.vm.on-reboot": "exit"}))
        .await;
    shim.start_task("v1", "").await.unwrap();
    shim.fake.end_guest(EndReason::GuestReset);
    assert_eq!(shim.wait("v1", "").await.unwrap(), 0);
}

#[tokio::test]
async fn panic_is_logged_with_the_console_and_is_a_failure_if_a_reboot_ends_the_task() {
    for (on_reboot, expected) in [("restart", None), ("exit", Some(137))] {
        let id = format!("panicking-{on_reboot}");
        let log = LogCapture::start("nutshell::shim::tasks::virtual_machine::boots");
        let shim = Shim::start().await;
        shim.create_vm(&id, json!({"io.containerd.nutshell.vm.on-reboot": on_reboot}))
            .await;
        shim.start_task(&id, "").await.unwrap();

        shim.fake
            .panic_guest("[    1.5] Kernel panic - not syncing: VFS: no root");

        match expected {
            Some(status) => assert_eq!(shim.wait(&id, "").await.unwrap(), status),
            None => drop(shim.fake.user_boots(2).await),
        }
        let lines = log.lines();
        let line = lines.iter().find(|line| line.contains(&id)).unwrap();
        assert!(
            line.contains("has panicked: Kernel panic - not syncing: VFS: no root; the end of its console:\n[    1.5]"),
            "{line}"
        );
    }
}

#[tokio::test]
async fn guest_that_ends_soon_or_writes_nothing_is_logged() {
    let log = LogCapture::start("nutshell::shim::tasks::virtual_machine::boots");
    let shim = Shim::start().await;
    shim.run_vm("silent").await;
    let find = |text: &str| log.lines().into_iter().find(|line| line.contains(text));
    let begun = Instant::now();
    while find("task silent: the guest has written nothing to its console").is_none() {
        assert!(begun.elapsed() < Duration::from_secs(20));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }

    shim.fake.end_guest(EndReason::GuestPowerOff);

    shim.wait("silent", "").await.unwrap();
    let line = find("task silent: the guest has switched its virtual machine off, soon after its start").unwrap();
    assert!(line.ends_with("the end of its console:\nthe last line"), "{line}");
}

#[tokio::test]
async fn kill_ends_a_machine_in_every_phase() {
    let shim = Shim::start().await;
    shim.create_vm("created", json!({})).await;
    shim.kill("created", "", 9).await.unwrap();
    assert_eq!(shim.wait("created", "").await.unwrap(), 137);
    shim.create_vm("terminated", json!({})).await;
    shim.kill("terminated", "", 15).await.unwrap();
    assert_eq!(shim.wait("terminated", "").await.unwrap(), 143);
    shim.run_vm("running").await;
    shim.kill("running", "", 9).await.unwrap();
    assert_eq!(shim.wait("running", "").await.unwrap(), 137);
    shim.run_vm("rebooting").await;
    shim.fake.end_guest(EndReason::GuestReset);
    shim.kill("rebooting", "", 9).await.unwrap();
    assert_eq!(shim.wait("rebooting", "").await.unwrap(), 137);
    for id in ["created", "terminated", "running", "rebooting"] {
        shim.delete(id, "").await.unwrap();
    }
}

#[tokio::test]
async fn sigterm_during_the_start_ends_the_task_before_its_kernel_runs() {
    let shim = Shim::start_with(Behaviour::NeverBuilt).await;
    shim.create_vm("v1", json!({})).await;
    let client = shim.task.clone();
    let start = StartRequest {
        id: "v1".to_owned(),
        ..StartRequest::default()
    };
    let start = tokio::spawn(async move { client.start(context::Context::default(), &start).await });
    shim.fake.user_boots(1).await;

    shim.kill("v1", "", 15).await.unwrap();

    let exit = tokio::time::timeout(Duration::from_secs(10), shim.wait("v1", "")).await;
    assert_eq!(exit.expect("the task does not end").unwrap(), 143);
    let (_, text) = error_of(start.await.unwrap());
    assert!(text.contains("a client has killed it"), "{text}");
    shim.delete("v1", "").await.unwrap();
}

#[tokio::test]
async fn power_button_during_a_reboot_ends_the_task() {
    let shim = Shim::start().await;
    shim.run_vm("v1").await;
    shim.fake.end_guest(EndReason::GuestReset);
    // The delay after a short run has begun, or the disk is being read.
    shim.kill("v1", "", 15).await.unwrap();
    assert_eq!(shim.wait("v1", "").await.unwrap(), 0);
}

/// The guest ignores the button, as it does while it boots.
#[tokio::test]
async fn power_button_without_a_listener_leaves_the_guest_running() {
    let shim = Shim::start_with(Behaviour::IgnoresPowerButton).await;
    for id in ["killed", "rebooted"] {
        shim.run_vm(id).await;
        shim.kill(id, "", 15).await.unwrap();
        assert_eq!(shim.status(id).await, Status::RUNNING);
    }
    // After the power button was pressed, a reset ends the task.
    shim.fake.end_guest(EndReason::GuestReset);
    assert_eq!(shim.wait("rebooted", "").await.unwrap(), 0);
    shim.kill("killed", "", 9).await.unwrap();
    assert_eq!(shim.wait("killed", "").await.unwrap(), 137);
}

#[tokio::test]
async fn disks_with_the_same_name_are_refused_with_that_name() {
    let shim = Shim::start().await;
    let volume = shim.folder.path().join("volume");
    std::fs::create_dir(&volume).unwrap();
    std::fs::write(volume.join("disk.img"), [0; 512]).unwrap();
    let other = shim.folder.path().join("other");
    std::fs::create_dir(&other).unwrap();
    std::fs::write(other.join("disk.img"), [0; 512]).unwrap();
    let seed = shim.folder.path().join("seed");
    std::fs::create_dir(&seed).unwrap();
    std::fs::write(seed.join("user-data"), "").unwrap();
    for (number, (mounts, name)) in [
        (vec![("/disks/root", &volume)], "root"),
        (vec![("/disks/seed", &volume), ("/cloud-init", &seed)], "seed"),
        (vec![("/disks/data", &volume), ("/disks/data", &other)], "data"),
    ]
    .into_iter()
    .enumerate()
    {
        let id = format!("v{number}");
        let request = shim.vm_request(&id, json!({}));
        let config = shim.folder.path().join(&id).join("config.json");
        let mut spec: Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
        let mounts = mounts.into_iter().map(|(destination, source)| {
            json!({"destination": destination, "type": "bind", "source": source, "options": ["rbind"]})
        });
        spec["mounts"] = mounts.collect();
        std::fs::write(config, spec.to_string()).unwrap();
        let (_, text) = error_of(shim.task.create(context::Context::default(), &request).await);
        assert!(
            text.contains(&format!("disk {name}: two disks have this name")),
            "{text}"
        );
    }
}

/// A virtual machine and a container, or two virtual machines.
#[tokio::test]
async fn creations_of_a_virtual_machine_and_another_container_in_one_pod_exclude_each_other() {
    for second_is_vm in [false, true] {
        // The old vmm takes a while to end, as a process does that frees much memory.
        let shim = Shim::start_with(Behaviour::OutlivedByFork).await;
        shim.create_sandbox("pod").await.unwrap();
        shim.start_sandbox("pod").await.unwrap();
        let first_vmm = shim.fake.vmm_pid();
        let in_pod = json!({
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": "pod",
        });
        let machine = shim.vm_request("v1", in_pod.clone());
        let other = match second_is_vm {
            true => shim.vm_request("v2", in_pod),
            false => shim.request_in_pod("c1", "container", |_| {}),
        };
        let client = shim.task.clone();
        let creation = tokio::spawn(async move { client.create(context::Context::default(), &machine).await });
        // The pod gets another machine. The virtual machine is not in the table of tasks before the old one has ended.
        while shim.fake.vmm_pid() == first_vmm {
            tokio::task::yield_now().await;
        }

        let (code, text) = error_of(shim.task.create(context::Context::default(), &other).await);

        assert_eq!(code, Code::FAILED_PRECONDITION, "{text}");
        creation.await.unwrap().unwrap();
        shim.start_task("v1", "").await.unwrap();
        shim.kill("v1", "", 9).await.unwrap();
        shim.wait("v1", "").await.unwrap();
    }
}

#[tokio::test]
async fn failure_of_the_machine_is_exit_status_137() {
    let shim = Shim::start().await;
    shim.run_vm("v1").await;
    shim.fake.end_guest(EndReason::KvmFailed("KVM_RUN: EFAULT".to_owned()));
    assert_eq!(shim.wait("v1", "").await.unwrap(), 137);
}

#[tokio::test]
async fn disk_without_a_kernel_fails_the_creation_and_leaves_nothing() {
    let shim = Shim::start_with(Behaviour::NoKernel).await;
    let request = shim.vm_request("v1", json!({}));
    let created = shim.task.create(context::Context::default(), &request).await;
    let (code, text) = error_of(created);
    assert_eq!(code, Code::UNKNOWN);
    assert!(
        text.contains("the disk /disk/disk.raw: no kernel to boot was found: disk slot 0: no boot loader"),
        "{text}"
    );
    assert_eq!(error_of(shim.state("v1", "").await).0, Code::NOT_FOUND);
    // The id is free again.
    let (_, text) = error_of(shim.task.create(context::Context::default(), &request).await);
    assert!(text.contains("no kernel to boot"), "{text}");
}

#[tokio::test]
async fn wrong_image_is_an_invalid_argument() {
    let shim = Shim::start().await;
    let request = shim.vm_request("v1", json!({}));
    std::fs::write(shim.folder.path().join("v1/rootfs/disk/second.raw"), "").unwrap();
    let (code, text) = error_of(shim.task.create(context::Context::default(), &request).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(text.contains("contains disk.raw, second.raw"), "{text}");
}

#[tokio::test]
async fn kernel_of_a_mount_boots_without_the_disk_reader() {
    let shim = Shim::start().await;
    let kernel = shim.folder.path().join("kernel");
    std::fs::create_dir(&kernel).unwrap();
    std::fs::write(kernel.join("vmlinuz"), "kernel").unwrap();
    let request = shim.vm_request("v1", json!({"io.containerd.nutshell.vm.kernel": "vmlinuz"}));
    let config = shim.folder.path().join("v1/config.json");
    let mut spec: Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    spec["mounts"] = json!([{"destination": "/kernel", "type": "bind", "source": kernel, "options": ["rbind"]}]);
    std::fs::write(config, spec.to_string()).unwrap();
    shim.task.create(context::Context::default(), &request).await.unwrap();
    shim.start_task("v1", "").await.unwrap();

    assert_eq!(shim.fake.user_boots(1).await, "\"panic=1\" console=ttyS0");
    assert!(shim.fake.requests().is_empty());
    shim.kill("v1", "", 9).await.unwrap();
    shim.wait("v1", "").await.unwrap();
}

#[tokio::test]
async fn calls_that_need_an_agent_fail_at_once() {
    let shim = Shim::start().await;
    shim.run_vm("v1").await;
    let (code, text) = error_of(shim.exec("v1", "e1", "true").await);
    assert_eq!(code, Code::UNIMPLEMENTED);
    assert!(
        text.contains("neither nutshell's agent nor the QEMU guest agent answers"),
        "{text}"
    );
    let resize = ResizePtyRequest {
        id: "v1".to_owned(),
        width: 80,
        height: 25,
        ..ResizePtyRequest::default()
    };
    shim.task
        .resize_pty(context::Context::default(), &resize)
        .await
        .unwrap();
    // SIGWINCH.
    shim.kill("v1", "", 28).await.unwrap();
    assert_eq!(shim.status("v1").await, Status::RUNNING);
}

#[tokio::test]
async fn image_without_a_disk_is_a_container() {
    let shim = Shim::start().await;
    let request = shim.vm_request("c1", json!({}));
    std::fs::remove_dir_all(shim.folder.path().join("c1/rootfs/disk")).unwrap();
    // Without a file server, the root of a container must be a disk.
    let (_, text) = error_of(shim.task.create(context::Context::default(), &request).await);
    assert!(text.contains("it has no file server"), "{text}");
}

/// Changes the memory limit of `v1` to so many MiB.
async fn update_memory(shim: &Shim, mib: u64) -> Result<(), String> {
    let resources = json!({"memory": {"limit": mib << 20}}).to_string().into_bytes();
    let request = UpdateTaskRequest {
        id: "v1".to_owned(),
        resources: Some(Any {
            value: resources,
            ..Any::default()
        })
        .into(),
        ..UpdateTaskRequest::default()
    };
    let updated = shim.task.update(context::Context::default(), &request).await;
    updated.map(drop).map_err(|error| error.to_string())
}

#[tokio::test]
async fn update_of_the_memory_limit_changes_the_memory_of_the_guest() {
    let shim = Shim::start().await;
    let annotations = json!({
        "io.containerd.nutshell.memory_mib": "128",
        "io.containerd.nutshell.vm.max-memory": "512Mi",
    });
    shim.create_vm("v1", annotations).await;
    shim.start_task("v1", "").await.unwrap();
    let command_line = shim.fake.user_boots(1).await;
    assert!(
        command_line.contains("memhp_default_state=online_movable"),
        "{command_line}"
    );

    update_memory(&shim, 512).await.unwrap();
    update_memory(&shim, 256).await.unwrap();

    assert_eq!(shim.fake.resizes(2), [(512 - 128, 1), (256 - 128, 1)]);
    let report = shim.tasks.full_report().await;
    assert_eq!(report.containers[0].machine.memory_bytes, 256 << 20);
    let error = update_memory(&shim, 514).await.unwrap_err();
    assert!(error.contains("exceeds 512 MiB, the maximum"), "{error}");

    // After a reboot it has the new size from the start, and has no more to add.
    shim.fake.end_guest(EndReason::GuestReset);
    shim.fake.user_boots(2).await;
    let error = update_memory(&shim, 128).await.unwrap_err();
    assert!(error.contains("is less than 256 MiB"), "{error}");
}

#[tokio::test]
async fn guest_that_takes_no_memory_keeps_its_size_and_fails_the_update() {
    let shim = Shim::start_with(Behaviour::NeverPlugsMemory).await;
    let annotations = json!({
        "io.containerd.nutshell.memory_mib": "128",
        "io.containerd.nutshell.vm.max-memory": "512Mi",
    });
    shim.create_vm("v1", annotations).await;
    shim.start_task("v1", "").await.unwrap();

    let error = update_memory(&shim, 256).await.unwrap_err();

    let expected = "did not add the memory within 1 s: its driver virtio_mem is not loaded";
    assert!(error.contains(expected), "{error}");
    assert_eq!(shim.fake.resizes(2), [(128, 1), (0, 1)]);
    assert_eq!(shim.status("v1").await, Status::RUNNING);
}

#[tokio::test]
async fn memory_that_the_guest_leaves_offline_is_removed_and_fails_the_update() {
    let shim = Shim::start_with(Behaviour::LeavesMemoryOffline).await;
    let annotations = json!({
        "io.containerd.nutshell.memory_mib": "128",
        "io.containerd.nutshell.vm.max-memory": "512Mi",
    });
    shim.create_vm("v1", annotations).await;
    shim.start_task("v1", "").await.unwrap();

    let error = update_memory(&shim, 256).await.unwrap_err();

    assert!(error.contains("leaves it offline"), "{error}");
    assert_eq!(shim.fake.resizes(2), [(128, 1), (0, 1)]);
    assert_eq!(shim.status("v1").await, Status::RUNNING);
}

#[tokio::test]
async fn power_button_while_a_reboot_reads_the_disk_ends_the_task() {
    let shim = Shim::start_with(Behaviour::ReadsDiskOnce).await;
    shim.run_vm("v1").await;
    shim.fake.end_guest(EndReason::GuestReset);
    let is_read = |request: &Request| matches!(request, Request::FindDiskKernel { .. });
    while shim.fake.requests().iter().filter(|request| is_read(request)).count() < 2 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }

    shim.kill("v1", "", 15).await.unwrap();

    let exit = tokio::time::timeout(Duration::from_secs(10), shim.wait("v1", "")).await;
    assert_eq!(exit.expect("the task does not end").unwrap(), 0);
}
