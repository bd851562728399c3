//! Reads seed disks with other implementations of FAT.

use std::{
    fs,
    io::{self, Read, Seek},
    os::{
        fd::AsFd,
        unix::fs::{FileExt, symlink},
    },
    path::Path,
    process::{Command, Output},
};

use rustix::fs::{SealFlags, fcntl_get_seals, ftruncate};
use tempfile::{TempDir, tempdir};

use super::{
    DataSource, Identity, KeyDirectory, SeedError,
    identity::{Hostname, InstanceId},
    image::{self, Contents},
    keys::{KeysError, MAX_KEY_SIZE, MAX_NAMES},
    make_disk, make_disk_of_files,
};

const ID: &str = "00112233-4455-4677-8899-aabbccddeeff";

fn identity() -> Identity {
    Identity {
        instance_id: InstanceId::parse(ID).unwrap(),
        hostname: Hostname::parse("db-0").unwrap(),
    }
}

/// Adds a version of a Secret with these keys and makes it the current one, as the kubelet does.
pub(in crate::shim::vm) fn publish(directory: &Path, version: &str, keys: &[(&str, &str)]) {
    fs::create_dir(directory.join(version)).unwrap();
    for (name, value) in keys {
        fs::write(directory.join(version).join(name), value).unwrap();
        let link = directory.join(name);
        if !link.is_symlink() {
            symlink(Path::new("..data").join(name), link).unwrap();
        }
    }
    symlink(version, directory.join("..data_tmp")).unwrap();
    fs::rename(directory.join("..data_tmp"), directory.join("..data")).unwrap();
}

/// A directory with these keys.
fn keys(keys: &[(&str, &[u8])]) -> TempDir {
    let directory = tempdir().unwrap();
    for (name, value) in keys {
        fs::write(directory.path().join(name), value).unwrap();
    }
    directory
}

fn run(program: &str, package: &str, arguments: &[&str]) -> Output {
    Command::new(program)
        .args(arguments)
        .env("LC_ALL", "C")
        .output()
        .unwrap_or_else(|error| {
            panic!("cannot run {program}: {error}: install the package {package}, or run `make unit`")
        })
}

/// Returns the output of a program, which must succeed.
fn output_of(program: &str, package: &str, arguments: &[&str]) -> Vec<u8> {
    let output = run(program, package, arguments);
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
    assert!(output.stderr.is_empty(), "{program} {arguments:?}: {output:?}");
    output.stdout
}

/// A disk in a file that other programs open.
struct Disk {
    folder: TempDir,
    bytes: Vec<u8>,
}

impl Disk {
    fn new(mut disk: fs::File) -> Self {
        let folder = tempdir().unwrap();
        let mut bytes = Vec::new();
        disk.rewind().unwrap();
        disk.read_to_end(&mut bytes).unwrap();
        fs::write(folder.path().join("disk"), &bytes).unwrap();
        let disk = Self { folder, bytes };
        disk.check();
        disk
    }

    fn make(directory: &Path, source: DataSource) -> Self {
        Self::new(make_disk(&KeyDirectory::find(directory).unwrap(), source, &identity(), None).unwrap())
    }

    fn path(&self) -> String {
        self.folder.path().join("disk").to_str().unwrap().to_owned()
    }

    /// Fails if the file system has an error.
    fn check(&self) {
        let output = output_of("fsck.fat", "dosfstools", &["-n", &self.path()]);
        let text = String::from_utf8(output).unwrap();
        // fsck.fat prints its version and a summary; a complaint is another line.
        assert_eq!(text.lines().count(), 2, "{text}");
    }

    /// A property of the file system, as udev finds it.
    fn property(&self, name: &str) -> String {
        let arguments = ["-p", "-o", "value", "-s", name, &self.path()];
        let value = String::from_utf8(output_of("blkid", "util-linux", &arguments)).unwrap();
        value.trim_end().to_owned()
    }

    /// The paths of all files and directories.
    fn list(&self) -> Vec<String> {
        let output = output_of("mdir", "mtools", &["-i", &self.path(), "-/", "-b", "::"]);
        let text = String::from_utf8(output).unwrap();
        let mut paths: Vec<String> = text.lines().map(|line| line.replacen("::/", "", 1)).collect();
        paths.sort_unstable();
        paths
    }

    fn read(&self, path: &str) -> Vec<u8> {
        output_of("mtype", "mtools", &["-i", &self.path(), &format!("::/{path}")])
    }

    fn read_text(&self, path: &str) -> String {
        String::from_utf8(self.read(path)).unwrap()
    }
}

#[test]
fn no_cloud_disk_has_the_users_values_unchanged() {
    let directory = keys(&[
        ("userData", b"#cloud-config\n\0\xff\r\n"),
        ("networkData", b"network"),
        ("metadata", b"dsmode: local"),
        ("vendordata", b""),
    ]);
    let disk = Disk::make(directory.path(), DataSource::NoCloud);
    assert_eq!(disk.property("TYPE"), "vfat");
    assert_eq!(disk.property("LABEL"), "CIDATA");
    assert_eq!(disk.list(), ["meta-data", "network-config", "user-data", "vendor-data"]);
    assert_eq!(disk.read("user-data"), b"#cloud-config\n\0\xff\r\n");
    assert_eq!(disk.read("network-config"), b"network");
    assert_eq!(disk.read("meta-data"), b"dsmode: local");
    assert_eq!(disk.read("vendor-data"), b"");
}

#[test]
fn no_cloud_disk_has_default_metadata_and_network_configuration() {
    let directory = keys(&[("user-data", b"u")]);
    let disk = Disk::make(directory.path(), DataSource::NoCloud);
    assert_eq!(disk.list(), ["meta-data", "network-config", "user-data"]);
    assert_eq!(
        disk.read_text("meta-data"),
        format!("instance-id: \"{ID}\"\nlocal-hostname: \"db-0\"\n")
    );
    let network = "version: 2\nethernets:\n  eth0:\n    match:\n      driver: virtio_net\n    dhcp4: true\n";
    assert_eq!(disk.read_text("network-config"), network);
    assert_eq!(disk.bytes.len(), 8 << 10);
}

#[test]
fn configuration_drive_has_openstacks_names() {
    let minimal = keys(&[("user-data", b"u")]);
    let complete = keys(&[
        ("user-data", b"{}"),
        ("meta-data", b"m"),
        ("network-config", b"n"),
        ("vendor-data", b"v"),
    ]);
    for source in [DataSource::ConfigDrive, DataSource::Ignition] {
        let disk = Disk::make(minimal.path(), source);
        assert_eq!(disk.property("TYPE"), "vfat");
        // Ignition waits for `by-label/config-2`.
        assert_eq!(disk.property("LABEL"), "config-2");
        assert_eq!(
            disk.list(),
            [
                "openstack/",
                "openstack/latest/",
                "openstack/latest/meta_data.json",
                "openstack/latest/user_data"
            ]
        );
        assert_eq!(disk.read("openstack/latest/user_data"), b"u");
        let metadata: serde_json::Value =
            serde_json::from_slice(&disk.read("openstack/latest/meta_data.json")).unwrap();
        assert_eq!(metadata, serde_json::json!({"uuid": ID, "hostname": "db-0"}));

        let disk = Disk::make(complete.path(), source);
        for (name, value) in [
            ("user_data", "{}"),
            ("meta_data.json", "m"),
            ("network_data.json", "n"),
            ("vendor_data.json", "v"),
        ] {
            assert_eq!(disk.read_text(&format!("openstack/latest/{name}")), value);
        }
    }
}

#[test]
fn largest_values_fit() {
    let values: Vec<Vec<u8>> = (0..4u8)
        .map(|seed| {
            (0..1u32 << 20)
                .map(|index| (index.wrapping_mul(2_654_435_761) >> 24) as u8 ^ seed)
                .collect()
        })
        .collect();
    let names = ["user-data", "meta-data", "vendor-data", "network-config"];
    let files: Vec<_> = names.iter().copied().zip(values.iter().map(Vec::as_slice)).collect();
    let directory = keys(&files);
    for (source, names) in [
        (DataSource::NoCloud, names),
        (
            DataSource::ConfigDrive,
            [
                "openstack/latest/user_data",
                "openstack/latest/meta_data.json",
                "openstack/latest/vendor_data.json",
                "openstack/latest/network_data.json",
            ],
        ),
    ] {
        let disk = Disk::make(directory.path(), source);
        assert!(disk.bytes.len() < (4 << 20) + (64 << 10), "{}", disk.bytes.len());
        for (name, value) in names.iter().zip(&values) {
            assert!(disk.read(name) == *value, "{name}");
        }
    }
}

/// A disk with one file of `size` bytes.
fn disk_of_size(size: usize, folder: &'static [&'static str]) -> io::Result<fs::File> {
    image::write(&Contents {
        label: *b"LABEL      ",
        folder,
        files: vec![("file".to_owned(), vec![0xa5; size])],
    })
}

#[test]
fn file_system_of_each_size_is_correct() {
    // Around the ends of a cluster, of a sector of the table (341 entries), and of the largest file system.
    let sizes = (0..=2)
        .chain(2047..=2049)
        .chain((334..=342).map(|clusters| clusters * 2048));
    for size in sizes.chain([4081 * 2048, 4082 * 2048]) {
        let disk = Disk::new(disk_of_size(size, &["a", "b"]).unwrap());
        assert_eq!(disk.bytes.len() % 4096, 0, "{size}");
        assert!(
            disk.bytes.len() < size + size / 512 + (16 << 10),
            "{size}: {}",
            disk.bytes.len()
        );
        assert!(disk.read("a/b/file") == vec![0xa5; size], "{size}");
    }
    for (clusters, folder) in [(4083, &["a", "b"][..]), (4085, &[]), (70_000, &[])] {
        let error = disk_of_size(clusters * 2048, folder).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge, "{clusters}");
    }
}

#[test]
fn names_of_each_length_are_correct() {
    const NAMES: &str = "abcdefghijklmnopqrstuvwxyz0123456789-ABCDEFG";
    let files = (1..=NAMES.len()).map(|length| (&NAMES[..length], vec![0xa5; length]));
    let disk = Disk::new(
        image::write(&Contents {
            label: *b"LABEL      ",
            // The entries of the folder need more than one cluster.
            folder: &["a-folder.with_14", "exactly-13.is"],
            files: files.clone().map(|(name, bytes)| (name.to_owned(), bytes)).collect(),
        })
        .unwrap(),
    );
    for (name, bytes) in files {
        assert_eq!(disk.read(&format!("a-folder.with_14/exactly-13.is/{name}")), bytes);
    }
    assert_eq!(disk.list().len(), NAMES.len() + 2);
}

#[test]
fn equal_seeds_result_in_equal_disks() {
    let directory = keys(&[("user-data", b"u")]);
    let first = Disk::make(directory.path(), DataSource::ConfigDrive);
    let again = keys(&[("userdata", b"u")]);
    let second = Disk::make(again.path(), DataSource::ConfigDrive);
    assert!(first.bytes == second.bytes);
    let listing = output_of("mdir", "mtools", &["-i", &first.path(), "::/openstack/latest"]);
    let listing = String::from_utf8(listing).unwrap();
    assert_eq!(listing.matches("1980-01-01   0:00").count(), 4, "{listing}");

    let other = keys(&[("user-data", b"v")]);
    let other = Disk::make(other.path(), DataSource::ConfigDrive);
    assert_ne!(first.property("UUID"), other.property("UUID"));
}

#[test]
fn disk_is_sealed() {
    let directory = keys(&[("user-data", b"u")]);
    let disk = make_disk(
        &KeyDirectory::find(directory.path()).unwrap(),
        DataSource::NoCloud,
        &identity(),
        None,
    )
    .unwrap();
    let expected = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    assert_eq!(fcntl_get_seals(&disk).unwrap(), expected);
    assert!(disk.write_at(b"x", 0).is_err());
    assert!(ftruncate(&disk, 0).is_err());
    assert!(ftruncate(&disk, 1 << 20).is_err());
}

#[test]
fn directory_without_user_data_makes_no_disk() {
    let directory = keys(&[("meta-data", b"m")]);
    let error = make_disk(
        &KeyDirectory::find(directory.path()).unwrap(),
        DataSource::NoCloud,
        &identity(),
        None,
    )
    .unwrap_err();
    assert!(
        matches!(error, SeedError::Keys(KeysError::NoUserData { .. })),
        "{error}"
    );
}

#[test]
fn data_sources_are_named_in_lower_case() {
    for (name, expected) in [
        ("nocloud", DataSource::NoCloud),
        ("configdrive", DataSource::ConfigDrive),
        ("ignition", DataSource::Ignition),
    ] {
        assert_eq!(name.parse::<DataSource>().unwrap(), expected);
    }
    for name in ["", "NoCloud", "ignition ", "openstack"] {
        let error = name.parse::<DataSource>().unwrap_err();
        assert_eq!(error, format!("{name:?} is none of nocloud, configdrive and ignition"));
    }
}

/// The disk with the keys in `directory` as files, or the error with the path of the directory replaced.
fn disk_of_files(directory: &Path, name: &str) -> Result<Disk, String> {
    let opened = fs::File::open(directory).unwrap();
    match make_disk_of_files(directory, opened.as_fd(), name) {
        Ok(disk) => Ok(Disk::new(disk)),
        Err(error) => Err(error.to_string().replace(directory.to_str().unwrap(), "DIR")),
    }
}

#[test]
fn keys_of_a_secret_are_the_files_of_a_disk() {
    let directory = tempdir().unwrap();
    let longest = "k".repeat(253);
    publish(directory.path(), "..1", &[("tls.crt", "old")]);
    let keys = [
        ("tls.crt", "new"),
        ("TLS.KEY", ""),
        (".hidden", "h"),
        ("disk", "a key"),
        (&longest, "long"),
    ];
    publish(directory.path(), "..2", &keys);

    let disk = disk_of_files(directory.path(), "app-config.v1").unwrap();

    assert_eq!(disk.property("TYPE"), "vfat");
    assert_eq!(disk.property("LABEL"), "APP-CONFIG_");
    assert_eq!(disk.list().len(), keys.len());
    for (name, value) in keys {
        assert_eq!(disk.read_text(name), value);
    }
    let empty = tempdir().unwrap();
    publish(empty.path(), "..1", &[]);
    let disk = disk_of_files(empty.path(), "a").unwrap();
    assert_eq!(disk.property("LABEL"), "A");
}

#[test]
fn largest_files_fit_on_a_disk() {
    let value = vec![0xa5; usize::try_from(MAX_KEY_SIZE).unwrap() - 1];
    let (a, b, c, d) = (&value, &value, &value, &value);
    let directory = keys(&[("a", a), ("b", b), ("c", c), ("d", d), ("e", b"1234")]);
    let disk = disk_of_files(directory.path(), "large").unwrap();
    assert!(disk.read("d") == value);
    assert_eq!(disk.read("e"), b"1234");
}

#[test]
fn keys_that_a_disk_cannot_have_are_refused_with_their_name_and_the_limit() {
    let large = vec![0; usize::try_from(MAX_KEY_SIZE).unwrap()];
    let too_large = [&large[..], b"x"].concat();
    let too_long = "k".repeat(254);
    let numbers: Vec<String> = (0..=MAX_NAMES).map(|number| number.to_string()).collect();
    let many: Vec<(&str, &[u8])> = numbers.iter().map(|name| (name.as_str(), &b""[..])).collect();
    let cannot_be_a_name = "cannot be the name of a file on the disk: it must have 1 to 253";
    for (files, key, expected) in [
        (
            &[
                ("a", &large[..]),
                ("b", &large),
                ("c", &large),
                ("d", &large),
                ("e", b"x"),
            ][..],
            "\"e\" does not fit",
            "the keys in DIR have more than 4096 KiB together",
        ),
        (
            &[("big", &too_large)],
            "the key \"big\" in DIR",
            "is larger than 1024 KiB",
        ),
        (&many, "DIR", "more than 64 names"),
        (
            &[("Key", b""), ("kEY", b"")],
            "\"Key\" and \"kEY\" in DIR",
            "differ only in upper and lower case",
        ),
        (&[("end.", b"")], "\"end.\" in DIR", cannot_be_a_name),
        (&[("a b", b"")], "\"a b\" in DIR", cannot_be_a_name),
        (&[("\u{e4}", b"")], "\"\u{e4}\" in DIR", cannot_be_a_name),
        (&[(too_long.as_str(), b"")], "in DIR", cannot_be_a_name),
    ] {
        let directory = keys(files);
        let Err(error) = disk_of_files(directory.path(), "data") else {
            panic!("accepted: {expected}");
        };
        assert!(error.contains(key) && error.contains(expected), "{error}");
    }
    let nested = keys(&[]);
    fs::create_dir(nested.path().join("folder")).unwrap();
    let Err(error) = disk_of_files(nested.path(), "data") else {
        panic!("accepted");
    };
    assert_eq!(
        error,
        "the key \"folder\" in DIR is a directory: it must be a regular file"
    );
}

#[test]
fn vendor_data_of_the_runtime_is_used_if_the_user_has_none() {
    let make = |source, values: &[(&str, &[u8])]| {
        let directory = keys(values);
        let disk = make_disk(
            &KeyDirectory::find(directory.path()).unwrap(),
            source,
            &identity(),
            Some(b"ours".to_vec()),
        )
        .unwrap();
        Disk::new(disk)
    };
    let own = make(DataSource::NoCloud, &[("user-data", b"u"), ("vendor-data", b"theirs")]);
    assert_eq!(own.read("vendor-data"), b"theirs");
    let default = make(DataSource::NoCloud, &[("user-data", b"u")]);
    assert_eq!(default.read("vendor-data"), b"ours");
    let other = make(DataSource::ConfigDrive, &[("user-data", b"u")]);
    assert!(
        !other.list().contains(&"openstack/latest/vendor_data.json".to_owned()),
        "{:?}",
        other.list()
    );
}
