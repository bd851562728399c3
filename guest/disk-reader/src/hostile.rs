//! Feeds random and mutated input to each parser. None may panic or take long. The inputs are the same in each run.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::disk::{Disk, FileSystem, Location};
use crate::{command_line, entries, extlinux, grub, identify, newest, partition_types, pattern, uki, version};

/// How many inputs each parser gets from each sample.
const ROUNDS: usize = 100;

/// How long one input may take, on a host that is busy with other tests.
const LIMIT: Duration = Duration::from_secs(10);

/// Pseudo-random numbers (xorshift).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit.max(1) as u64).unwrap()
    }

    fn bytes(&mut self, max: usize) -> Vec<u8> {
        let length = self.below(max);
        (0..length).map(|_| self.next().to_le_bytes()[0]).collect()
    }
}

/// Makes one to eight changes: replaces a byte, removes or repeats a part, truncates, or inserts one of `PARTS`.
fn mutate(sample: &[u8], random: &mut Random) -> Vec<u8> {
    /// Bytes and words with a meaning for a parser.
    const PARTS: [&[u8]; 24] = [
        b"\0",
        b"\n",
        b" ",
        b"'",
        b"\"",
        b"$",
        b"${",
        b"{",
        b"}",
        b"\\",
        b";",
        b"#",
        b">",
        b"=",
        b"[",
        b"if ",
        b"fi\n",
        b"(",
        b"../",
        b"function f {\nf\n}\nf\n",
        b"set x=$x$x$x\n",
        b"source $config_file\n",
        b"submenu s {\n",
        b"\xff",
    ];
    let mut bytes = sample.to_vec();
    for _ in 0..=random.below(8) {
        let at = random.below(bytes.len() + 1);
        let end = (at + random.below(64)).min(bytes.len());
        match random.below(5) {
            0 if at < bytes.len() => bytes[at] = random.next().to_le_bytes()[0],
            1 => drop(bytes.drain(at..end)),
            2 => {
                let part = bytes[at..end].repeat(1 + random.below(40));
                bytes.splice(at..at, part);
            }
            3 => bytes.truncate(at),
            _ => drop(bytes.splice(at..at, PARTS[random.below(PARTS.len())].iter().copied())),
        }
    }
    bytes
}

fn fixtures() -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let list = |folder: &Path| -> Vec<PathBuf> { fs::read_dir(folder).unwrap().map(|it| it.unwrap().path()).collect() };
    let mut files: Vec<_> = list(&folder).iter().flat_map(|folder| list(folder)).collect();
    files.sort();
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

/// Calls `parse` with random and mutated inputs.
fn feed(samples: &[Vec<u8>], parse: &dyn Fn(&[u8])) {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for sample in samples {
        for round in 0..ROUNDS {
            let input = if round % 10 == 0 {
                random.bytes(4096)
            } else {
                mutate(sample, &mut random)
            };
            let start = Instant::now();
            parse(&input);
            assert!(
                start.elapsed() < LIMIT,
                "an input of {} bytes took {:?}",
                input.len(),
                start.elapsed()
            );
        }
    }
}

fn feed_text(parse: &dyn Fn(&str)) {
    feed(&fixtures(), &|bytes| parse(&String::from_utf8_lossy(bytes)));
}

#[test]
fn no_text_makes_a_parser_panic() {
    let location = Location::new(0, "/boot/loader/entries/a.conf");
    feed_text(&|text| drop(grub::parse_parts(text)));
    feed_text(&|text| drop(entries::parse_parts(text, &location)));
    feed_text(&|text| extlinux::parse_parts(text, &location));
    feed_text(&|text| newest::parse_parts(text));
    feed_text(&|text| drop(command_line::clean(text)));
}

#[test]
fn no_configuration_makes_the_search_for_a_kernel_panic() {
    let folder = tempfile::tempdir().unwrap();
    for path in [
        "boot/grub/grubenv",
        "boot/loader/entries/a.conf",
        "boot/extlinux.conf",
        "boot/grub/grub.cfg",
    ] {
        let path = folder.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "").unwrap();
    }
    fs::write(folder.path().join("boot/vmlinuz-6.12.48+deb13-amd64"), "kernel").unwrap();
    let samples = fixtures();
    let mut random = Random(1);
    for sample in &samples {
        for _ in 0..ROUNDS / 5 {
            for path in [
                "boot/grub/grub.cfg",
                "boot/grub/grubenv",
                "boot/loader/entries/a.conf",
                "boot/extlinux.conf",
            ] {
                let other = &samples[random.below(samples.len())];
                let sample = if random.below(3) == 0 { other } else { sample };
                fs::write(folder.path().join(path), mutate(sample, &mut random)).unwrap();
            }
            let file_system = FileSystem {
                name: "vda1".to_owned(),
                number: Some(1),
                partition_type: crate::PartitionType::Other,
                partition_label: None,
                kind: "ext4".to_owned(),
                uuid: Some("0f6b2f0e-7a54-4b9c-9a35-1f2d3c4b5a69".to_owned()),
                label: None,
                root: fs::File::open(folder.path()).unwrap().into(),
            };
            let start = Instant::now();
            let disk = Disk::new(vec![file_system], start + LIMIT);
            if let Err(error) = crate::find_kernel(&disk) {
                assert!(error.to_string().len() <= crate::MAX_ERROR_LENGTH);
            }
            assert!(start.elapsed() < LIMIT, "{:?}", start.elapsed());
        }
    }
}

#[test]
fn no_pair_of_names_makes_a_comparison_panic() {
    let names: Vec<_> = ["m-6.1.0-18-amd64+3-1.conf", "5.14.0~rc1^post-0", "[a-z]*\\?[!]]x"]
        .map(|name| name.as_bytes().to_vec())
        .into();
    feed(&names, &|bytes| {
        let text = String::from_utf8_lossy(bytes);
        let (left, right) = text.split_at(text.floor_char_boundary(text.len() / 2));
        assert_eq!(
            version::compare(left, right),
            version::compare(right, left).reverse(),
            "{left:?} {right:?}"
        );
        pattern::is_match(left, right);
    });
}

#[test]
fn no_bytes_make_a_superblock_or_partition_table_panic() {
    let mut start = vec![0; crate::START_SIZE];
    for (at, bytes) in [
        (512, &b"EFI PART"[..]),
        (512 + 72, &[2]),
        (512 + 80, &[128]),
        (512 + 84, &[128]),
        (1080, b"\x53\xef"),
        (32768, b"\x01CD001"),
        (65600, b"_BHRfS_M"),
        (510, b"\x55\xaa"),
    ] {
        start[at..at + bytes.len()].copy_from_slice(bytes);
    }
    let samples = [start.clone(), start[1000..].to_vec(), start[64 << 10..].to_vec()];
    feed(&samples, &|bytes| {
        let _ = identify(bytes);
        for block_size in [0, 1, 512, 4096, usize::MAX] {
            let _ = partition_types(bytes, block_size);
        }
    });
}

#[test]
fn no_bytes_make_the_parser_of_images_panic() {
    // A file of the PE format with the start of its section table.
    let mut image = vec![0; 1024];
    for (at, bytes) in [
        (0, &b"MZ"[..]),
        (0x3c, &[0x80]),
        (0x80, b"PE\0\0\x64\x86\x03"),
        (0x94, &[112]),
        (0x98, &[0x0b, 0x02]),
        (0x108, b".linux\0\0\x10\0\0\0\0\0\0\0\x10\0\0\0\x10"),
        (0x130, b".profile"),
        (0x158, b".linux\0\0"),
    ] {
        image[at..at + bytes.len()].copy_from_slice(bytes);
    }
    assert!(uki::parse_parts(&image), "the sample is not valid");
    feed(&[image.clone(), image[..0x110].to_vec()], &|bytes| {
        let _ = uki::parse_parts(bytes);
    });
}
