//! Create: refused requests, and root file systems.

use std::fs;

use containerd_shim_protos::{api::Status, ttrpc::Code, types::mount::Mount};
use nutshell_conformance::{
    bundle::{self, idle, mount, shell, spec},
    container::Prepared,
    with_fake_containerd,
};
use serde_json::{Value, json};

#[test]
fn refused_create_reports_the_cause_leaves_nothing_and_sends_no_event() {
    let with = |pointer: &str, value: Value| {
        let mut spec = idle();
        *spec.pointer_mut(pointer).unwrap() = value;
        spec
    };
    with_fake_containerd(|containerd| {
        for (spec, code, reason) in [
            (
                spec(&["no-such-command"]),
                Code::UNKNOWN,
                "exec: \"no-such-command\": executable file not found in $PATH",
            ),
            (
                spec(&["/no/such/command"]),
                Code::UNKNOWN,
                "exec: \"/no/such/command\": stat /no/such/command: no such file or directory",
            ),
            (
                spec(&["/not-executable"]),
                Code::UNKNOWN,
                "exec: \"/not-executable\": permission denied",
            ),
            (
                with(
                    "/linux/namespaces",
                    json!([{"type": "pid"}, {"type": "ipc"}, {"type": "mount"}]),
                ),
                Code::INVALID_ARGUMENT,
                "cannot share the network of its host",
            ),
            (
                with("/linux/namespaces", json!([{"type": "ipc"}, {"type": "network"}])),
                Code::INVALID_ARGUMENT,
                "cannot share the pid namespace of its host",
            ),
            (
                with("/linux/namespaces", json!([{"type": "pid"}, {"type": "network"}])),
                Code::INVALID_ARGUMENT,
                "cannot share the ipc namespace of its host",
            ),
            (with("/process/args", json!([])), Code::INVALID_ARGUMENT, "process.args"),
        ] {
            let prepared = containerd.prepare(&spec);
            let failure = prepared.shim.task.create(&prepared.request).unwrap_err();
            assert_eq!(failure.code, Some(code), "{failure}");
            assert!(failure.message.contains(reason), "{reason} is not in {failure}");
            let state = prepared.shim.task.state(&prepared.bundle.id, "").unwrap_err();
            assert_eq!(state.code, Some(Code::NOT_FOUND));
            prepared.abandon();
        }
        assert_eq!(containerd.events.all(), []);
    });
}

#[test]
fn malformed_request_is_refused_without_side_effects() {
    with_fake_containerd(|containerd| {
        let prepared = containerd.prepare(&idle());
        type Change = fn(&mut Prepared<'_>);
        let table: [(Change, Code, &str); 5] = [
            (
                |prepared| prepared.request.checkpoint = "/checkpoint".to_owned(),
                Code::UNIMPLEMENTED,
                "cannot be restored from a checkpoint",
            ),
            (
                |prepared| prepared.request.bundle = String::new(),
                Code::INVALID_ARGUMENT,
                "bundle \"\"",
            ),
            (
                // Resolved from the shim's working directory, which is the bundle.
                |prepared| prepared.request.bundle = "no-such-folder".to_owned(),
                Code::UNKNOWN,
                "/no-such-folder/config.json",
            ),
            (
                |prepared| prepared.request.id = "../c".to_owned(),
                Code::INVALID_ARGUMENT,
                "../c",
            ),
            (
                |prepared| prepared.request.stdin = prepared.request.bundle.clone() + "/no-such-fifo",
                Code::UNKNOWN,
                "no-such-fifo",
            ),
        ];
        for (change, code, reason) in table {
            let mut changed = containerd.prepare_in(prepared.bundle.clone(), prepared.shim.clone());
            change(&mut changed);
            let failure = changed.shim.task.create(&changed.request).unwrap_err();
            assert_eq!(failure.code, Some(code), "{failure}");
            assert!(failure.message.contains(reason), "{reason} is not in {failure}");
        }
        assert_eq!(containerd.events.all(), []);
        // The shim still creates a container.
        let container = prepared.create().unwrap();
        assert_eq!(container.status(""), Status::CREATED);
        container.end();
    });
}

#[test]
fn relative_bundle_path_is_resolved_from_the_shims_working_directory() {
    with_fake_containerd(|containerd| {
        let mut prepared = containerd.prepare(&shell("echo in the bundle"));
        prepared.request.bundle = ".".to_owned();
        let container = prepared.create().unwrap();
        let state = container.task().state(&container.id, "").unwrap();
        assert_eq!(state.bundle, container.bundle.path.to_str().unwrap());
        container.start();
        assert_eq!(container.wait(), 0);
        assert_eq!(container.stdout.read_to_end(), "in the bundle\n");
        container.end();
    });
}

#[test]
fn duplicate_id_fails_with_already_exists_and_leaves_the_container_running() {
    with_fake_containerd(|containerd| {
        let container = containerd.run(&idle());
        let again = containerd.prepare_in(container.bundle.clone(), container.shim.clone());
        let failure = again.shim.task.create(&again.request).unwrap_err();
        assert_eq!(failure.code, Some(Code::ALREADY_EXISTS), "{failure}");
        assert_eq!(container.output_of("echo alive"), "alive\n");
        let id = container.id.clone();
        container.end();
        assert_eq!(containerd.events.of_container(&id)[..2], ["create", "start"]);
    });
}

#[test]
fn bind_overlay_bundle_and_read_only_roots_are_used_as_given() {
    with_fake_containerd(|containerd| {
        let root = bundle::rootfs().to_str().unwrap();
        let make_folder = |part: &str| {
            let folder = containerd.folder().join(part);
            fs::create_dir_all(&folder).unwrap();
            folder.display().to_string()
        };
        let overlay = vec![mount(
            "overlay",
            "overlay",
            &[
                &format!("lowerdir={root}"),
                &format!("upperdir={}", make_folder("upper")),
                &format!("workdir={}", make_folder("work")),
            ],
        )];
        // No mounts: the root file system is the folder rootfs of the bundle.
        let none: Vec<Mount> = Vec::new();
        for (rootfs, read_only) in [(overlay, false), (none, false), (bundle::rootfs_mounts(), true)] {
            let mut spec = shell("echo $(ls / | wc -l); echo mine >/mine && cat /mine");
            spec["root"]["readonly"] = read_only.into();
            let mut prepared = containerd.prepare(&spec);
            if rootfs.is_empty() {
                bundle::fill_root(&prepared.bundle.path.join("rootfs"));
            }
            let kind = rootfs.first().map_or(String::new(), |mount| mount.type_.clone());
            prepared.request.rootfs = rootfs;
            let bundle_root = prepared.bundle.path.join("rootfs");
            let container = prepared.create().unwrap();
            container.start();
            assert_eq!(container.wait(), u32::from(read_only), "{kind}");
            let (stdout, stderr) = (container.stdout.read_to_end(), container.stderr.read_to_end());
            if read_only {
                assert!(stderr.contains("Read-only file system"), "{stderr}");
            } else {
                assert!(stdout.ends_with("mine\n"), "{kind}: {stdout} {stderr}");
            }
            match kind.as_str() {
                "overlay" => assert_eq!(
                    fs::read_to_string(containerd.folder().join("upper/mine")).unwrap(),
                    "mine\n"
                ),
                "" => assert_eq!(fs::read_to_string(bundle_root.join("mine")).unwrap(), "mine\n"),
                _ => assert!(!bundle::rootfs().join("mine").exists()),
            }
            container.end();
        }
    });
}
