//! Compares the reader for qcow2 with QEMU's `qemu-img`, which makes the images. Debian has it in the package
//! qemu-utils; `make unit` installs it.

#![cfg(test)]

mod common;

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use common::Random;
use nutshell_disk_image::{Base, Image};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

/// The size of the test disk in bytes. Of the sizes of clusters, only the smallest divides it.
const DISK_SIZE: u64 = 9 * MIB + 3 * 512;

fn output(program: &str, arguments: &[&str]) -> Output {
    Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}: install the package qemu-utils"))
}

fn run(program: &str, arguments: &[&str]) {
    let output = output(program, arguments);
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A folder with the raw image of a disk that has random, compressible and no data.
struct Fixture {
    folder: TempDir,
    raw: PathBuf,
}

impl Fixture {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let raw = folder.path().join("raw");
        let file = File::create(&raw).unwrap();
        file.set_len(DISK_SIZE).unwrap();
        let mut random = Random::new(1);
        let mut noise = vec![0; 300_000];
        noise.fill_with(|| random.next().to_le_bytes()[3]);
        let words: Vec<u8> = (0..150_000_u32).flat_map(|number| (number / 7).to_le_bytes()).collect();
        for (offset, bytes) in [
            (0, &noise[..5000]),
            (200_000, &words[..]),
            (2 * MIB, &noise),
            (5 * MIB + 700, &words[1000..9000]),
            (DISK_SIZE - 70_000, &words[..30_000]),
            (DISK_SIZE - 512, &noise[..512]),
        ] {
            file.write_all_at(bytes, offset).unwrap();
        }
        Self { folder, raw }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Converts the raw image to qcow2. `arguments` are further arguments of `qemu-img convert`.
    fn convert(&self, arguments: &[&str]) -> PathBuf {
        let path = self.path("image.qcow2");
        let mut all = vec!["convert", "-O", "qcow2"];
        all.extend(arguments);
        all.extend([text(&self.raw), text(&path)]);
        run("qemu-img", &all);
        path
    }

    /// The bytes of the disk in the image `path`, as `qemu-img` reads it.
    fn bytes_by_qemu(&self, path: &Path) -> Vec<u8> {
        let raw = self.path("by-qemu");
        run(
            "qemu-img",
            &["convert", "-f", "qcow2", "-O", "raw", text(path), text(&raw)],
        );
        fs::read(raw).unwrap()
    }
}

/// Reads all of the disk, in pieces of random size and order, from a file and from memory.
fn assert_reads_as(path: &Path, expected: &[u8], name: &str) {
    let from_memory = Image::open_read_only(Box::new(fs::read(path).unwrap()));
    let from_file = Image::open_read_only(Box::new(File::open(path).unwrap()));
    let mut random = Random::new(2);
    for image in [from_memory, from_file] {
        let image = image.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(image.size(), expected.len() as u64, "{name}");
        let mut bytes = vec![0xee; expected.len()];
        image
            .read(&mut &mut bytes[..], 0)
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(bytes == expected, "{name}: reads differ");
        for _ in 0..60 {
            let start = usize::try_from(random.below(expected.len() as u64)).unwrap();
            let count = usize::try_from(random.below(200_000))
                .unwrap()
                .min(expected.len() - start);
            let part = &mut bytes[..count];
            part.fill(0xee);
            image.read(&mut &mut *part, start as u64).unwrap();
            assert!(
                part == &expected[start..start + count],
                "{name}: {count} bytes at {start}"
            );
        }
        assert!(
            image.read(&mut &mut [0; 1][..], image.size()).is_err(),
            "{name}: past the end"
        );
    }
}

#[test]
fn image_reads_as_in_qemu_for_all_versions_compressions_and_cluster_sizes() {
    let fixture = Fixture::new();
    let expected = fs::read(&fixture.raw).unwrap();
    let cases: &[&[&str]] = &[
        &["-o", "compat=0.10"],
        &["-o", "compat=0.10", "-c"],
        &["-o", "compat=1.1"],
        &["-o", "compat=1.1", "-c"],
        &["-o", "compat=1.1,compression_type=zstd", "-c"],
        &["-o", "compat=1.1,compression_type=zstd"],
        &["-o", "cluster_size=512"],
        &["-o", "cluster_size=512", "-c"],
        &["-o", "cluster_size=4k,compression_type=zstd", "-c"],
        &["-o", "cluster_size=2M"],
        &["-o", "cluster_size=2M", "-c"],
        &["-o", "cluster_size=2M,compression_type=zstd", "-c"],
        &["-o", "refcount_bits=1"],
        &["-o", "refcount_bits=64"],
        &["-o", "lazy_refcounts=on"],
        &["-o", "preallocation=metadata"],
        &["-o", "preallocation=falloc"],
        &["-S", "0"],
    ];
    for arguments in cases {
        let path = fixture.convert(arguments);
        assert_reads_as(&path, &expected, &format!("{arguments:?}"));
        fs::remove_file(path).unwrap();
    }
}

#[test]
fn image_reads_as_in_qemu_after_writes_discards_snapshots_and_resizes() {
    let fixture = Fixture::new();
    for options in ["compat=0.10", "compat=1.1", "cluster_size=1k", "compression_type=zstd"] {
        let path = fixture.convert(&["-c", "-o", options]);
        let image = text(&path);
        let write_zeroes = ["-f", "qcow2", "-c", "write -z 2097152 300000", image];
        run("qemu-img", &["snapshot", "-c", "before", image]);
        run(
            "qemu-io",
            &[
                "-f",
                "qcow2",
                "-c",
                "write -P 0x5a 1000000 150000",
                "-c",
                "discard 5242880 65536",
                image,
            ],
        );
        run("qemu-io", &write_zeroes);
        run("qemu-img", &["snapshot", "-c", "after", image]);
        run("qemu-io", &["-f", "qcow2", "-c", "write -P 0xa5 1003000 20000", image]);
        let expected = fixture.bytes_by_qemu(&path);
        assert!(expected != fs::read(&fixture.raw).unwrap());
        assert_reads_as(&path, &expected, options);
        // qemu-img refuses to resize an image of version 2 with snapshots.
        if options != "compat=0.10" {
            run("qemu-img", &["resize", image, "700M"]);
            let base = Base::open(Box::new(File::open(&path).unwrap())).unwrap();
            assert_eq!(base.size(), 700 * MIB, "{options}");
            let mut end = vec![0xee; 1 << 20];
            base.read(&mut &mut end[..], 699 * MIB, 1 << 20).unwrap();
            assert!(end.iter().all(|byte| *byte == 0), "{options}");
        }
        fs::remove_file(path).unwrap();
    }
}

#[test]
fn survey_counts_what_qemu_img_counts() {
    let fixture = Fixture::new();
    let path = fixture.convert(&["-c"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 1 7M 200k", text(&path)]);
    let Base::Qcow2(image) = Base::open(Box::new(File::open(&path).unwrap())).unwrap() else {
        panic!("not qcow2");
    };
    let survey = image.survey().unwrap();
    let check = output("qemu-img", &["check", "--output", "json", text(&path)]);
    let report = String::from_utf8(check.stdout).unwrap();
    let number = |name: &str| -> u64 {
        let (_, rest) = report
            .split_once(&format!("\"{name}\": "))
            .unwrap_or_else(|| panic!("{report}"));
        rest.split(|character: char| !character.is_ascii_digit())
            .next()
            .unwrap()
            .parse()
            .unwrap()
    };
    assert_eq!(
        survey.data_clusters + survey.compressed_clusters,
        number("allocated-clusters")
    );
    assert_eq!(survey.compressed_clusters, number("compressed-clusters"));
    assert_eq!(
        survey.data_clusters + survey.compressed_clusters + survey.zero_clusters,
        number("total-clusters")
    );
}

#[test]
fn reads_fit_into_the_stack_of_a_queues_thread() {
    let fixture = Fixture::new();
    for options in ["compression_type=zlib", "compression_type=zstd"] {
        let path = fixture.convert(&["-c", "-o", options]);
        let base = Base::open(Box::new(File::open(&path).unwrap())).unwrap();
        // The stack size of a disk's thread (src/devices/virtio/block/mod.rs).
        let thread = std::thread::Builder::new().stack_size(128 << 10).spawn(move || {
            let mut bytes = vec![0; 1 << 20];
            for offset in (0..8 * MIB).step_by(1 << 20) {
                base.read(&mut &mut bytes[..], offset, 1 << 20).unwrap();
            }
        });
        thread.unwrap().join().unwrap();
        fs::remove_file(path).unwrap();
    }
}

fn refusal(path: &Path) -> String {
    match Base::open(Box::new(File::open(path).unwrap())) {
        Ok(_) => panic!("{} is not refused", path.display()),
        Err(error) => error.to_string(),
    }
}

#[test]
fn image_with_an_unsupported_feature_is_refused_with_its_name() {
    let fixture = Fixture::new();
    let path = fixture.path("image.qcow2");
    let data_file = format!("data_file={}", text(&fixture.path("data")));
    let raw = text(&fixture.raw);
    let secret = ["--object", "secret,id=key,data=secret"];
    let aes = "encrypt.format=aes,encrypt.key-secret=key";
    let cases: &[(&[&str], &str)] = &[
        (&["-b", raw, "-F", "raw"], "it has the backing file \""),
        (
            &["-o", "extended_l2=on", "", "1M"],
            "extended L2 entries (incompatible feature bit 4)",
        ),
        (
            &["-o", &data_file, "", "1M"],
            "incompatible feature bit 2, \"external data file\"",
        ),
        (
            &[secret[0], secret[1], "-o", aes, "", "1M"],
            "it is encrypted (crypt_method 1, AES)",
        ),
    ];
    for (arguments, expected) in cases {
        let mut all = vec!["create", "-q", "-f", "qcow2"];
        // An empty argument stands for the name of the image, which comes before its size.
        all.extend(
            arguments
                .iter()
                .map(|argument| if argument.is_empty() { text(&path) } else { argument }),
        );
        if !arguments.contains(&"") {
            all.push(text(&path));
        }
        run("qemu-img", &all);
        let error = refusal(&path);
        assert!(
            error.starts_with("qcow2 base image: ") && error.contains(expected),
            "{error}"
        );
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn image_of_another_format_is_refused_with_the_name_of_the_format() {
    let fixture = Fixture::new();
    for (format, name) in [("vmdk", "VMDK"), ("vhdx", "VHDX"), ("vpc", "VHD"), ("qed", "QED")] {
        let path = fixture.path(format);
        run("qemu-img", &["create", "-q", "-f", format, text(&path), "1M"]);
        let error = refusal(&path);
        assert!(
            error.contains(&format!("the format of the base image is {name},")),
            "{error}"
        );
    }
}

#[test]
fn truncated_image_is_refused_or_fails_to_read() {
    let fixture = Fixture::new();
    let expected = fs::read(&fixture.raw).unwrap();
    for arguments in [&["-o", "cluster_size=4k"][..], &["-c"]] {
        let path = fixture.convert(arguments);
        let complete = fs::read(&path).unwrap();
        let mut lengths: Vec<usize> = (0..complete.len()).step_by(complete.len() / 60).collect();
        lengths.extend([4, 71, 72, 103, complete.len() - 4096, complete.len() - 1]);
        for length in lengths.into_iter().filter(|length| *length >= 4) {
            let error = match Base::open(Box::new(complete[..length].to_vec())) {
                Err(error) => error.to_string(),
                Ok(base) => {
                    assert!(length > complete.len() - 65536, "{length} of {}", complete.len());
                    let mut bytes = vec![0; usize::try_from(base.size()).unwrap()];
                    let count = bytes.len();
                    match base.read(&mut &mut bytes[..], 0, count) {
                        Err(error) => error.to_string(),
                        Ok(()) => {
                            // Only bytes after the last used sector are missing.
                            assert!(bytes == expected, "{length} of {}", complete.len());
                            continue;
                        }
                    }
                }
            };
            assert!(
                error.contains("the file is truncated: it has") || error.contains("cannot be decompressed"),
                "{length} of {}: {error}",
                complete.len()
            );
        }
    }
}

/// Reads all tables and all bytes of a disk, unless the image is refused.
fn read_everything(bytes: Vec<u8>) {
    let Ok(base) = Base::open(Box::new(bytes)) else {
        return;
    };
    let mut buffer = vec![0; 1 << 20];
    // A changed size may be terabytes.
    for offset in (0..base.size()).step_by(1 << 20).take(16) {
        let count = usize::try_from(base.size() - offset).unwrap_or(usize::MAX).min(1 << 20);
        let _ = base.read(&mut &mut buffer[..count], offset, count);
    }
    if let Base::Qcow2(image) = &base
        && base.size() < 1 << 30
    {
        let _ = image.survey();
    }
}

#[test]
fn damaged_image_causes_no_panic() {
    let fixture = Fixture::new();
    let mut random = Random::new(3);
    for arguments in [
        &["-c"][..],
        &["-c", "-o", "compression_type=zstd,cluster_size=16k"],
        &["-o", "cluster_size=4k"],
    ] {
        let path = fixture.convert(arguments);
        let complete = fs::read(&path).unwrap();
        for round in 0..150 {
            let mut damaged = complete.clone();
            for _ in 0..=random.below(8) {
                // In half of the rounds only the header is changed, in the others any byte of the image.
                let end = if round % 2 == 0 { 112 } else { damaged.len() as u64 };
                let position = usize::try_from(random.below(end)).unwrap();
                damaged[position] = match random.below(3) {
                    0 => 0xff,
                    1 => 0,
                    _ => random.next().to_le_bytes()[2],
                };
            }
            read_everything(damaged);
        }
        fs::remove_file(path).unwrap();
    }
}
