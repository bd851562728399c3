//! Create: refused requests, and root file systems.

use std::{
    fmt::Write as _,
    fs,
    os::unix::fs::{FileTypeExt, symlink},
    process::Command,
};

use containerd_shim_protos::{api::Status, ttrpc::Code, types::mount::Mount};
use nutshell_conformance::{
    bundle::{self, idle, mount, shell, spec},
    container::Prepared,
    layers::{Numbers, block_mode, erofs, ext4, fill_with_anything, layer, make_opaque, run, text, whiteout},
    pod::Pod,
    with_fake_containerd,
};
use rustix::mount::UnmountFlags;
use serde_json::{Value, json};

/// The number of layers of the largest root. The limit of an image in Docker is 127.
const MANY_LAYERS: usize = 100;

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

#[test]
fn writes_go_to_the_new_disk_of_the_snapshot_and_stay_there() {
    with_fake_containerd(|containerd| {
        let base = erofs(&layer(containerd, "base", |folder| {
            bundle::fill_root(folder);
            fs::create_dir(folder.join("opaque")).unwrap();
            fs::write(folder.join("opaque/hidden"), "").unwrap();
            fs::write(folder.join("removed"), "").unwrap();
        }));
        let top = erofs(&layer(containerd, "top", |folder| {
            whiteout(&folder.join("removed"));
            fs::create_dir(folder.join("opaque")).unwrap();
            make_opaque(&folder.join("opaque"));
            fs::write(folder.join("opaque/shown"), "").unwrap();
        }));
        let writable = containerd.folder().join("rwlayer.img");
        let mounts = block_mode(&writable, &[top.clone(), base.clone()]);
        let run_in_new_shim = |script: &str| {
            let mut prepared = containerd.prepare(&shell(script));
            prepared.request.rootfs.clone_from(&mounts);
            let container = prepared.create().unwrap();
            container.start();
            let status = container.wait();
            let output = container.stdout.read_to_end();
            assert_eq!(status, 0, "{output}{}", container.stderr.read_to_end());
            container.end();
            output
        };

        let output = run_in_new_shim(
            "ls /removed /opaque 2>&1; stat -c %a /; grep ' / ' /proc/mounts | cut -d' ' -f1,3; echo kept >/opaque/kept; \
             rm /etc/passwd",
        );
        assert_eq!(
            output,
            "ls: /removed: No such file or directory\n/opaque:\nshown\n755\noverlay overlay\n"
        );
        let output = run_in_new_shim("ls /opaque; ls /etc/passwd 2>&1; cat /opaque/kept");
        assert_eq!(
            output,
            "kept\nshown\nls: /etc/passwd: No such file or directory\nkept\n"
        );

        run("e2fsck", &["-fn", text(&writable)]);
        let names = run("debugfs", &["-R", "ls -p /upper/opaque", text(&writable)]);
        assert!(names.contains("/kept/"), "{names}");
        for file in [base, top, writable] {
            fs::remove_file(file).unwrap();
        }
        fs::remove_dir_all(containerd.folder().join("base")).unwrap();
        fs::remove_dir_all(containerd.folder().join("top")).unwrap();
    });
}

#[test]
fn writes_go_to_the_upper_directory_of_the_host() {
    with_fake_containerd(|containerd| {
        let base = layer(containerd, "base", |folder| {
            bundle::fill_root(folder);
            fs::write(folder.join("removed"), "").unwrap();
        });
        let top = layer(containerd, "top", |folder| fs::write(folder.join("shown"), "").unwrap());
        let images = [erofs(&top), erofs(&base)];
        let [upper, work] = ["upper", "work"].map(|name| layer(containerd, name, |_| {}));
        let overlay = [
            &format!("workdir={}", text(&work)),
            &format!("upperdir={}", text(&upper)),
            "lowerdir={{ overlay 0 1 }}",
        ];
        let mut prepared = containerd.prepare(&shell("ls / | wc -l; rm /removed; echo mine >/mine; ls -d /shown"));
        prepared.request.rootfs = images
            .iter()
            .map(|image| mount("erofs", text(image), &["ro", "loop"]))
            .chain([mount("format/overlay", "overlay", &overlay)])
            .collect();

        let container = prepared.create().unwrap();
        container.start();

        assert_eq!(container.wait(), 0, "{}", container.stderr.read_to_end());
        assert!(container.stdout.read_to_end().ends_with("\n/shown\n"));
        assert_eq!(fs::read_to_string(upper.join("mine")).unwrap(), "mine\n");
        let removed = fs::symlink_metadata(upper.join("removed")).unwrap();
        assert!(removed.file_type().is_char_device());
        container.end();
        let attached = run("losetup", &["--list", "--noheadings", "--output", "BACK-FILE"]);
        assert!(!attached.contains("erofs"), "{attached}");
        for folder in [base, top, upper, work] {
            fs::remove_dir_all(folder).unwrap();
        }
        for image in images {
            fs::remove_file(image).unwrap();
        }
    });
}

/// Prints what a program can see of the tree: types, modes, links, owners and contents. Both the host's and the
/// container's shell run this.
const LIST_TREE: &str = "cd tree && find . | LC_ALL=C sort | while read -r path; do \
    kind=$(stat -c '%F %a %u:%g %h' \"$path\"); \
    if [ -L \"$path\" ]; then content=$(readlink \"$path\"); \
    elif [ -f \"$path\" ]; then content=$(cat \"$path\"); else content=; fi; \
    echo \"$path $kind $content\"; done";

#[test]
fn hundred_layers_in_a_pod_look_as_in_an_overlay_of_the_host() {
    with_fake_containerd(|containerd| {
        let mut numbers = Numbers(2026);
        let folders: Vec<_> = (0..MANY_LAYERS)
            .map(|number| {
                layer(containerd, &number.to_string(), |folder| {
                    if number == 0 {
                        bundle::fill_root(folder);
                    }
                    fill_with_anything(folder, number, &mut numbers);
                })
            })
            .collect();
        let images: Vec<_> = folders.iter().rev().map(|folder| erofs(folder)).collect();
        let merged = containerd.folder().join("merged");
        fs::create_dir(&merged).unwrap();
        let mut lower = String::new();
        for number in (0..MANY_LAYERS).rev() {
            write!(lower, ":{number}").unwrap();
        }
        // Relative paths, because a page is the limit of the options.
        let options = format!("lowerdir={}", &lower[1..]);
        let mounted = Command::new("mount")
            .args(["-t", "overlay", "overlay", "-o", &options, "merged"])
            .current_dir(containerd.folder())
            .status();
        assert!(mounted.unwrap().success());
        let busybox = Command::new("chroot")
            .arg(&merged)
            .args(["/bin/busybox", "env", "PATH=/bin", "sh", "-c", LIST_TREE])
            .output()
            .unwrap();
        let expected = String::from_utf8(busybox.stdout).unwrap();
        assert!(expected.lines().count() > 30, "{expected}");
        rustix::mount::unmount(&merged, UnmountFlags::empty()).unwrap();

        let pod = Pod::by_task(containerd);
        let writable = containerd.folder().join("rwlayer.img");
        let bundle = containerd.bundle(&pod.shell("sleep 100000"));
        let mut prepared = containerd.prepare_in(bundle, pod.shim.clone());
        prepared.request.rootfs = block_mode(&writable, &images);
        let container = prepared.create().unwrap();
        container.start();

        assert_eq!(container.output_of(LIST_TREE), expected);
        assert_eq!(container.output_of("echo new >/tree/new && cat /tree/new"), "new\n");

        pod.remove_container(&container);
        // The disk slot is free again, and the next container gets the same disk.
        let bundle = containerd.bundle(&pod.shell("sleep 100000"));
        let mut prepared = containerd.prepare_in(bundle, pod.shim.clone());
        prepared.request.rootfs = block_mode(&writable, &images);
        let container = prepared.create().unwrap();
        container.start();
        assert_eq!(container.output_of("cat /tree/new"), "new\n");
        pod.remove_container(&container);
        pod.end();
        for folder in folders {
            fs::remove_dir_all(folder).unwrap();
        }
        for image in images {
            fs::remove_file(image).unwrap();
        }
        fs::remove_file(writable).unwrap();
        fs::remove_dir(merged).unwrap();
    });
}

#[test]
fn merged_metadata_reads_the_contents_of_its_devices() {
    with_fake_containerd(|containerd| {
        let folder = layer(containerd, "root", |folder| {
            bundle::fill_root(folder);
            fs::write(folder.join("numbers"), "0123456789".repeat(5000)).unwrap();
        });
        let (metadata, contents) = (folder.with_extension("meta"), folder.with_extension("blob"));
        let device = format!("--blobdev={}", text(&contents));
        run(
            "mkfs.erofs",
            &["--chunksize=4096", &device, text(&metadata), text(&folder)],
        );
        let device = format!("device={}", text(&contents));
        let mut prepared = containerd.prepare(&shell("md5sum </numbers; touch /file"));
        prepared.request.rootfs = vec![mount("erofs", text(&metadata), &["ro", "loop", &device])];

        let container = prepared.create().unwrap();
        container.start();

        assert_eq!(container.wait(), 1);
        let sum = run("sh", &["-c", &format!("md5sum <{}", text(&folder.join("numbers")))]);
        assert_eq!(container.stdout.read_to_end(), sum);
        assert!(container.stderr.read_to_end().contains("Read-only file system"));
        container.end();
        fs::remove_dir_all(folder).unwrap();
        fs::remove_file(metadata).unwrap();
        fs::remove_file(contents).unwrap();
    });
}

#[test]
fn root_can_be_a_directory_of_a_disk() {
    with_fake_containerd(|containerd| {
        let folder = layer(containerd, "disk", |folder| {
            fs::create_dir(folder.join("upper")).unwrap();
            bundle::fill_root(&folder.join("upper"));
        });
        let image = ext4(&folder);
        let disk = mount("ext4", text(&image), &["rw", "loop"]);
        for (bind, status) in [
            (mount("format/mkdir/bind", "{{ mount 0 }}/upper", &["rbind"]), 0),
            (mount("format/bind", "{{ mount 0 }}/upper", &["ro", "rbind"]), 1),
        ] {
            let mut prepared = containerd.prepare(&shell("touch /file && ls /file"));
            prepared.request.rootfs = vec![disk.clone(), bind];
            let container = prepared.create().unwrap();
            container.start();
            assert_eq!(container.wait(), status, "{}", container.stderr.read_to_end());
            container.end();
        }
        let names = run("debugfs", &["-R", "ls -p /upper", text(&image)]);
        assert!(names.contains("/file/"), "{names}");
        fs::remove_dir_all(folder).unwrap();
        fs::remove_file(image).unwrap();
    });
}

/// A container with a device node of the disk could make such links for the next container with this snapshot.
#[test]
fn links_in_the_writable_disk_are_not_followed() {
    with_fake_containerd(|containerd| {
        let base = layer(containerd, "base", bundle::fill_root);
        let base_image = erofs(&base);
        let folder = layer(containerd, "disk", |folder| {
            symlink("/run", folder.join("upper")).unwrap();
            fs::create_dir(folder.join("work")).unwrap();
        });
        let image = ext4(&folder);
        let mut prepared = containerd.prepare(&idle());
        prepared.request.rootfs = block_mode(&image, std::slice::from_ref(&base_image));

        let failure = prepared.shim.task.create(&prepared.request).unwrap_err();

        assert!(failure.message.contains("mount the overlay"), "{failure}");
        prepared.abandon();
        for folder in [base, folder] {
            fs::remove_dir_all(folder).unwrap();
        }
        for image in [base_image, image] {
            fs::remove_file(image).unwrap();
        }
    });
}
