//! Layers of root file systems in files, as containerd's EROFS snapshotter makes them.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use containerd_shim_protos::types::mount::Mount;
use rustix::fs::{CWD, FileType, Mode, XattrFlags};

use crate::{bundle::mount, fake_containerd::FakeContainerd};

/// Runs a program of the host and returns its output.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {text}{errors}");
    text
}

/// The path as text.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Makes an EROFS image of a folder.
pub fn erofs(folder: &Path) -> PathBuf {
    let image = folder.with_extension("erofs");
    run("mkfs.erofs", &[text(&image), text(folder)]);
    image
}

/// A folder of a layer, which `fill` fills.
pub fn layer(containerd: &FakeContainerd, name: &str, fill: impl FnOnce(&Path)) -> PathBuf {
    let folder = containerd.folder().join(name);
    fs::create_dir(&folder).unwrap();
    fill(&folder);
    folder
}

/// Makes a file that hides one of this name in lower layers of an overlay.
pub fn whiteout(path: &Path) {
    rustix::fs::mknodat(CWD, path, FileType::CharacterDevice, Mode::empty(), 0).unwrap();
}

/// Hides the files of this folder in lower layers of an overlay.
pub fn make_opaque(folder: &Path) {
    rustix::fs::setxattr(folder, c"trusted.overlay.opaque", b"y", XattrFlags::empty()).unwrap();
}

/// The mounts of an active snapshot with a writable disk at `writable` above `layers`, topmost first.
pub fn block_mode(writable: &Path, layers: &[PathBuf]) -> Vec<Mount> {
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

/// Makes an ext4 image with the files of a folder.
pub fn ext4(folder: &Path) -> PathBuf {
    let image = folder.with_extension("img");
    run("mke2fs", &["-q", "-t", "ext4", "-d", text(folder), text(&image), "16M"]);
    image
}

/// A sequence of numbers that looks random, the same in each run.
#[derive(Debug)]
pub struct Numbers(pub u64);

impl Numbers {
    /// The next number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        // Knuth's MMIX generator. Its high bits are the better ones.
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// Fills a layer with files, folders, links, whiteouts and opaque folders, whose names are also in other layers.
pub fn fill_with_anything(folder: &Path, number: usize, numbers: &mut Numbers) {
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
