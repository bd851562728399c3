//! `containerd-shim-nutshell-v2 disk inspect FILE` reports how the vmm would use an image as the base of a disk,
//! without a machine: its format, its size, what is allocated, or why it is refused.
//!
//! An image is hostile input, and the user is root. So this process opens the file and starts a child, the
//! [`inspector`], which gives up all privileges before it reads the file, in the same jail as a vmm.
//!
//! Belongs here: the command line and the text of the report. Does not belong here: the formats, which
//! `nutshell_disk_image` reads. The executable's `main` calls [`main`] and [`inspector::main`], each for its role.

pub(crate) mod inspector;
mod report;
pub(crate) mod system_calls;

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, Read, Write as _},
    os::unix::{ffi::OsStrExt, fs::OpenOptionsExt},
    path::{Path, PathBuf},
    process::{ExitCode, ExitStatus, Stdio},
    time::Duration,
};

use self::report::{Findings, Report};
use crate::{
    jail::RoleCommand,
    shim::blocking::{self, FILE_SYSTEM_LIMIT},
};

/// The first argument that selects this role.
pub(crate) const ROLE: &str = "disk";

/// The maximum size of the inspector's answer in bytes.
const MAX_ANSWER: u64 = 64 << 10;

/// How long the inspector may take. It reads the tables of an image, which have about 128 MiB for each TiB.
const INSPECTION_LIMIT: Duration = Duration::from_secs(300);

/// Why a disk cannot be inspected.
#[derive(Debug, thiserror::Error)]
enum DiskError {
    #[error("usage: containerd-shim-nutshell-v2 disk inspect FILE [--json]")]
    Usage,
    #[error("cannot open {}: {source}", path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error("cannot run the process that reads {}: {source}", path.display())]
    Start { path: PathBuf, source: io::Error },
    #[error(
        "the process that reads {} ended without an answer ({status}): read its messages above, if there are any",
        path.display()
    )]
    NoAnswer { path: PathBuf, status: ExitStatus },
    #[error("cannot read the answer about {}: {source}", path.display())]
    Answer { path: PathBuf, source: io::Error },
    #[error("cannot inspect {}: {reason}", path.display())]
    Inspector { path: PathBuf, reason: String },
    #[error("cannot encode the report: {0}")]
    Encode(#[from] serde_json::Error),
    #[error("cannot print the report: {0}")]
    Print(#[source] io::Error),
}

#[derive(Debug, PartialEq, Eq)]
struct Arguments {
    path: PathBuf,
    json: bool,
}

/// Runs the command line. An error is one line on standard error. The exit status is 0 only if the image can be used.
pub(crate) fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(2).collect();
    match run(&arguments) {
        Ok(status) => status,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[OsString]) -> Result<ExitCode, DiskError> {
    let Arguments { path, json } = parse(arguments).ok_or(DiskError::Usage)?;
    let report = Report {
        file: path.display().to_string(),
        findings: inspect(&path)?,
    };
    let text = if json {
        serde_json::to_string_pretty(&report)? + "\n"
    } else {
        report.to_text()
    };
    io::stdout().write_all(text.as_bytes()).map_err(DiskError::Print)?;
    Ok(match report.findings.is_usable() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// `None` for a wrong command line.
fn parse(arguments: &[OsString]) -> Option<Arguments> {
    let (mut words, mut json) = (Vec::<&OsStr>::new(), false);
    for argument in arguments {
        match argument.as_bytes() {
            b"--json" => json = true,
            [b'-', ..] => return None,
            _ => words.push(argument),
        }
    }
    match words[..] {
        [action, path] if action == "inspect" => Some(Arguments {
            path: path.into(),
            json,
        }),
        _ => None,
    }
}

/// Opens the image and has the inspector read it.
fn inspect(path: &Path) -> Result<Findings, DiskError> {
    let opened_path = path.to_owned();
    let path = || path.to_owned();
    let start_error = |source| DiskError::Start { path: path(), source };
    let file = blocking::run_without_runtime(FILE_SYSTEM_LIMIT, move || open(&opened_path))
        .and_then(|opened| opened)
        .map_err(|source| DiskError::Open { path: path(), source })?;
    let mut child = RoleCommand::new(inspector::ROLE)
        .and_then(|mut inspector| inspector.stdin(file).stdout(Stdio::piped()).spawn())
        .map_err(start_error)?;
    let stdout = child.stdout.take();
    let answer = blocking::run_without_runtime(INSPECTION_LIMIT, move || {
        let mut answer = Vec::new();
        match stdout {
            Some(stdout) => stdout.take(MAX_ANSWER).read_to_end(&mut answer).map(|_| answer),
            None => Ok(answer),
        }
    });
    // The inspector has ended, has sent too much, or hangs.
    let _ = child.kill();
    // Not reaped if it hangs, because it may not end.
    let answer = answer
        .and_then(|answer| answer)
        .map_err(|source| DiskError::Answer { path: path(), source })?;
    let status = child.wait().map_err(start_error)?;
    match serde_json::from_slice::<inspector::Answer>(&answer) {
        Ok(Ok(findings)) => Ok(findings),
        Ok(Err(error)) => Err(DiskError::Inspector {
            path: path(),
            reason: report::printable(&error),
        }),
        Err(_) => Err(DiskError::NoAnswer { path: path(), status }),
    }
}

/// Opens a regular file or block device for reading.
fn open(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::FileTypeExt;

    // Without O_NONBLOCK, opening a fifo would wait for a writer.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let kind = file.metadata()?.file_type();
    if kind.is_file() || kind.is_block_device() {
        Ok(file)
    } else {
        Err(io::Error::other("neither a file nor a block device"))
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::FileExt, process::Command};

    use super::*;
    use crate::disk::report::Clusters;

    fn qemu_img(arguments: &[&str]) {
        let output = Command::new("qemu-img")
            .args(arguments)
            .output()
            .unwrap_or_else(|error| panic!("qemu-img: {error}: install the package qemu-utils"));
        assert!(
            output.status.success(),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }

    #[test]
    fn command_line_selects_file_and_format_of_the_report() {
        let parse_line = |line: &str| {
            let words: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
            parse(&words)
        };
        let not_utf_8 = OsStr::from_bytes(b"/\xff");
        let arguments = parse(&["inspect".into(), not_utf_8.to_owned()]).unwrap();
        assert_eq!(arguments.path, not_utf_8);
        for (line, json) in [
            ("inspect /a", false),
            ("inspect /a --json", true),
            ("--json inspect /a", true),
        ] {
            assert_eq!(
                parse_line(line),
                Some(Arguments {
                    path: "/a".into(),
                    json
                }),
                "{line}"
            );
        }
        for line in ["", "inspect", "inspect a b", "show a", "inspect --all a"] {
            assert_eq!(parse_line(line), None, "{line}");
        }
    }

    #[test]
    fn only_files_and_block_devices_are_inspected() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for path in [&fifo, folder.path(), Path::new("/dev/null"), Path::new("/no/such/file")] {
            let error = inspect(path).unwrap_err().to_string();
            assert!(
                error.starts_with(&format!("cannot open {}: ", path.display())),
                "{error}"
            );
        }
    }

    // The tests below need root, as the jail does.

    #[test]
    fn raw_image_is_reported_with_size_and_allocated_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("raw");
        let file = File::create(&path).unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&[1; 4096], 8192).unwrap();

        let findings = inspect(&path).unwrap();

        assert!(findings.is_usable(), "{findings:?}");
        assert_eq!(findings.format.as_deref(), Some("raw"));
        assert_eq!((findings.file_size, findings.virtual_size), (1 << 20, Some(1 << 20)));
        assert_eq!(findings.allocated_bytes, Some(4096));
        assert_eq!(findings.qcow2, None);
    }

    #[test]
    fn qcow2_image_is_reported_with_clusters_compression_and_features() {
        let folder = tempfile::tempdir().unwrap();
        let [raw, image] = ["raw", "qcow2"].map(|name| folder.path().join(name));
        fs::write(&raw, [1; 300_032]).unwrap();
        File::options()
            .write(true)
            .open(&raw)
            .unwrap()
            .set_len(1 << 20)
            .unwrap();
        let options = "cluster_size=16k,compression_type=zstd,lazy_refcounts=on";
        let [raw, path] = [&raw, &image].map(|path| path.to_str().unwrap());
        qemu_img(&["convert", "-c", "-O", "qcow2", "-o", options, raw, path]);
        qemu_img(&["snapshot", "-c", "one", path]);

        let findings = inspect(&image).unwrap();

        assert!(findings.is_usable(), "{findings:?}");
        assert_eq!(findings.format.as_deref(), Some("qcow2"));
        assert_eq!(findings.virtual_size, Some(1 << 20));
        assert_eq!(findings.allocated_bytes, Some(19 * 16384));
        let qcow2 = findings.qcow2.unwrap();
        assert_eq!((qcow2.version, qcow2.cluster_size, qcow2.snapshots), (3, 16384, 1));
        assert_eq!(qcow2.compression, "zstd");
        assert_eq!(qcow2.features, ["lazy refcounts"]);
        let clusters = Clusters {
            data: 0,
            compressed: 19,
            zero: 45,
        };
        assert_eq!(qcow2.clusters, Some(clusters));
    }

    #[test]
    fn refused_image_is_reported_with_the_reason() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        fs::write(&path, b"QFI\xfb\0\0\0\x09".repeat(20)).unwrap();
        let findings = inspect(&path).unwrap();
        assert!(!findings.is_usable());
        assert_eq!(findings.format.as_deref(), Some("qcow2"));
        assert_eq!(
            findings.refusal.as_deref(),
            Some("qcow2 base image: version is 9, and only 2 and 3 are supported")
        );

        fs::write(&path, b"KDMV").unwrap();
        let findings = inspect(&path).unwrap();
        assert_eq!(findings.format, None);
        assert!(
            findings
                .refusal
                .unwrap()
                .contains("the format of the base image is VMDK")
        );
    }

    #[test]
    fn image_that_boots_but_has_unreadable_clusters_is_reported_as_damaged() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("qcow2");
        let path = image.to_str().unwrap();
        qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "preallocation=metadata",
            path,
            "65G",
        ]);
        // The L2 table of the last 512 MiB, which a vmm does not check.
        let file = File::options().read(true).write(true).open(path).unwrap();
        let number = |offset: u64| {
            let mut bytes = [0; 8];
            file.read_exact_at(&mut bytes, offset).unwrap();
            u64::from_be_bytes(bytes) & !(1 << 63)
        };
        let (l1_table, l1_index) = (number(40), 129);
        let l2_table = number(l1_table + l1_index * 8);
        file.write_all_at(&(1_u64 << 40).to_be_bytes(), l2_table + 8).unwrap();

        let findings = inspect(&image).unwrap();

        assert!(!findings.is_usable());
        assert_eq!(findings.refusal, None);
        let damage = findings.damage.unwrap();
        assert!(
            damage.contains("truncated") && damage.contains("a cluster is at byte 1099511627776"),
            "{damage}"
        );
    }
}
