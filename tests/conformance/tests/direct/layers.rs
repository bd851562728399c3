//! Root file systems of several layers in files, with the mounts that containerd's EROFS snapshotter sends.

use std::{
    fmt::Write as _,
    fs,
    os::unix::fs::{FileTypeExt, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use containerd_shim_protos::types::mount::Mount;
use nutshell_conformance::{
    FakeContainerd,
    bundle::{self, idle, mount, shell},
    pod::Pod,
    with_fake_containerd,
};
use rustix::{
    fs::{CWD, FileType, Mode, XattrFlags},
    mount::UnmountFlags,
};

/// The number of layers of the largest root. The limit of an image in Docker is 127.
const MANY_LAYERS: usize = 100;

/// Runs a program of the host and returns its output.
fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {text}{errors}");
    text
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Makes an EROFS image of a folder.
fn erofs(folder: &Path) -> PathBuf {
    let image = folder.with_extension("erofs");
    run("mkfs.erofs", &[text(&image), text(folder)]);
    image
}

/// A folder of a layer, which `fill` fills.
fn layer(containerd: &FakeContainerd, name: &str, fill: impl FnOnce(&Path)) -> PathBuf {
    let folder = containerd.folder().join(name);
    fs::create_dir(&folder).unwrap();
    fill(&folder);
    folder
}

fn whiteout(path: &Path) {
    rustix::fs::mknodat(CWD, path, FileType::CharacterDevice, Mode::empty(), 0).unwrap();
}

fn make_opaque(folder: &Path) {
    rustix::fs::setxattr(folder, c"trusted.overlay.opaque", b"y", XattrFlags::empty()).unwrap();
}

/// The mounts of an active snapshot with a writable disk at `writable` above `layers`, topmost first.
fn block_mode(writable: &Path, layers: &[PathBuf]) -> Vec<Mount> {
    let new_disk = mount(
        "mkfs/ext4",
        text(writable),
        &[
            "X-containerd.mkfs.fs=ext4",
            "X-containerd.mkfs.size=33554432",
            "rw",
            "loop",
        ],
    );
    let lower = match layers.len() {
        1 => "lowerdir={{ mount 1 }}".to_owned(),
        count => format!("lowerdir={{{{ overlay 1 {count} }}}}"),
    };
    let overlay = mount(
        "format/mkdir/overlay",
        "overlay",
        &[
            "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
            "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
            "workdir={{ mount 0 }}/work",
            "upperdir={{ mount 0 }}/upper",
            &lower,
        ],
    );
    let layers = layers.iter().map(|layer| mount("erofs", text(layer), &["ro", "loop"]));
    std::iter::once(new_disk).chain(layers).chain([overlay]).collect()
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

/// A sequence of numbers that looks random, the same in each run.
struct Numbers(u64);

impl Numbers {
    /// The next number below `bound`.
    fn below(&mut self, bound: u64) -> u64 {
        // Knuth's MMIX generator. Its high bits are the better ones.
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// Fills a layer with files, folders, links, whiteouts and opaque folders, whose names are also in other layers.
fn fill_with_anything(folder: &Path, number: usize, numbers: &mut Numbers) {
    for index in 0..3 {
        let parent = folder.join(format!("tree/{}", numbers.below(6)));
        if parent.symlink_metadata().is_ok_and(|found| !found.is_dir()) {
            continue;
        }
        fs::create_dir_all(&parent).unwrap();
        let path = parent.join(numbers.below(8).to_string());
        if path.symlink_metadata().is_ok() {
            continue;
        }
        match numbers.below(8) {
            0 => whiteout(&path),
            1 => symlink(format!("../{}", numbers.below(6)), &path).unwrap(),
            2 => fs::create_dir(&path).unwrap(),
            3 => {
                fs::create_dir(&path).unwrap();
                make_opaque(&path);
                fs::write(path.join(format!("in-{number}")), "").unwrap();
            }
            4 => {
                fs::write(&path, format!("linked in layer {number}")).unwrap();
                fs::hard_link(&path, parent.join(format!("link-{number}-{index}"))).unwrap();
            }
            _ => fs::write(&path, format!("written in layer {number}")).unwrap(),
        }
    }
    if numbers.below(10) == 0 {
        let name = folder.join(format!("tree/{}", numbers.below(6)));
        match name.symlink_metadata() {
            Ok(found) if found.is_dir() => make_opaque(&name),
            Ok(_) => {}
            Err(_) => whiteout(&name),
        }
    }
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

/// Makes an ext4 image with the files of a folder.
fn ext4(folder: &Path) -> PathBuf {
    let image = folder.with_extension("img");
    run("mke2fs", &["-q", "-t", "ext4", "-d", text(folder), text(&image), "16M"]);
    image
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
        prepared.request.rootfs = block_mode(&image, &[base_image.clone()]);

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
