//! The boot command with its descriptors, checked and assigned.

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;

use std::{
    fs::File,
    os::{fd::OwnedFd, unix::net::UnixStream},
};

use nutshell_disk_image::Image;

use super::{error::MachineError, file_part::FilePart};
use crate::{
    control::{BaseFormat, BoardKind, DiskAccess, DiskConfig, Extent, FileAccess, LinkConfig, MachineConfig, Software},
    devices::virtio::block::{Backing, JoinedFile, JoinedFiles},
};

/// A boot command with its descriptors.
#[derive(Debug)]
pub(super) struct BootResources {
    pub(super) config: MachineConfig,
    pub(super) kvm: OwnedFd,
    pub(super) kernel: File,
    pub(super) software: SoftwareResources,
    pub(super) file_server: Option<UnixStream>,
    /// With their serials.
    pub(super) disks: Vec<(String, Backing)>,
}

/// A [`Software`] with its descriptors.
#[derive(Debug)]
pub(super) enum SoftwareResources {
    Agent {
        board: BoardKind,
        initramfs: (File, Extent),
        /// The stream of [`nutshell_protocol::AGENT_PORT`].
        stream: OwnedFd,
        kernel_arguments: String,
    },
    User {
        initramfs: Option<(File, Extent)>,
        command_line: String,
        identity: Identity,
        console_input: Option<OwnedFd>,
        console_output: Option<OwnedFd>,
        /// The socket behind [`crate::control::GUEST_AGENT_PORT`].
        guest_agent: Option<OwnedFd>,
        /// With the queues of each tap device.
        links: Vec<(LinkConfig, Vec<OwnedFd>)>,
    },
}

/// The identity of the machine, which its guest reads from SMBIOS. `uuid` is in the byte order of RFC 9562.
#[derive(Debug, Default)]
pub(super) struct Identity {
    pub(super) uuid: [u8; 16],
    pub(super) oem_strings: Vec<String>,
}

impl BootResources {
    /// Assigns the descriptors, which come in the order that [`crate::control::Command::Boot`] documents.
    pub(super) fn parse(
        config: MachineConfig,
        software: Software,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Self, MachineError> {
        if config.vcpus == 0 || config.max_vcpus < config.vcpus {
            return Err(MachineError::BootCommand(
                "the number of vCPUs is 0 or exceeds max_vcpus",
            ));
        }
        if matches!(software, Software::User { .. }) && config.max_vcpus != config.vcpus {
            return Err(MachineError::BootCommand(
                "a user's kernel starts all vCPUs at boot, but vcpus differs from max_vcpus",
            ));
        }
        let mut descriptors = descriptors.into_iter();
        let mut next = |missing| descriptors.next().ok_or(MachineError::BootCommand(missing));
        let (kvm, kernel) = (next("no /dev/kvm")?, next("no kernel")?.into());
        let software = parse_software(software, &mut next)?;
        let file_server = match config.file_server {
            true => Some(next("no socket of the file server")?.into()),
            false => None,
        };
        let mut open = |disk: &DiskConfig| {
            let backing = open_disk(&disk.serial, &disk.access, || descriptors.next().map(File::from))?;
            Ok((disk.serial.clone(), backing))
        };
        let resources = Self {
            kvm,
            kernel,
            software,
            file_server,
            disks: config
                .disks
                .iter()
                .map(&mut open)
                .collect::<Result<_, MachineError>>()?,
            config,
        };
        match descriptors.next() {
            None => Ok(resources),
            Some(_) => Err(MachineError::BootCommand("too many descriptors")),
        }
    }
}

fn parse_software(
    software: Software,
    mut next: impl FnMut(&'static str) -> Result<OwnedFd, MachineError>,
) -> Result<SoftwareResources, MachineError> {
    match software {
        Software::Agent {
            board,
            initramfs,
            kernel_arguments,
        } => Ok(SoftwareResources::Agent {
            board,
            initramfs: (next("no initramfs")?.into(), initramfs),
            stream: next("no stream for the agent")?,
            kernel_arguments,
        }),
        Software::User {
            initramfs,
            command_line,
            uuid,
            oem_strings,
            console_input,
            console_output,
            guest_agent,
            links,
        } => {
            let mut optional = |wanted: bool, missing| wanted.then(|| next(missing)).transpose();
            Ok(SoftwareResources::User {
                initramfs: optional(initramfs.is_some(), "no initramfs")?
                    .map(File::from)
                    .zip(initramfs),
                command_line,
                identity: Identity { uuid, oem_strings },
                console_input: optional(console_input, "no input for the console")?,
                console_output: optional(console_output, "no output for the console")?,
                guest_agent: optional(guest_agent, "no socket for the guest agent")?,
                links: links
                    .into_iter()
                    .map(|link| {
                        let queues = (0..link.queues).map(|_| next("no queue for a link"));
                        Ok((link, queues.collect::<Result<_, _>>()?))
                    })
                    .collect::<Result<_, MachineError>>()?,
            })
        }
    }
}

/// Opens the disk with the serial `serial`, whose descriptors come from `next_file`.
pub(super) fn open_disk(
    serial: &str,
    access: &DiskAccess,
    mut next_file: impl FnMut() -> Option<File>,
) -> Result<Backing, MachineError> {
    let mut next_file = || next_file().ok_or_else(|| MachineError::DiskDescriptors(serial.to_owned()));
    let image = match access {
        DiskAccess::ReadOnly | DiskAccess::ReadWrite => {
            return Ok(Backing::File {
                file: next_file()?,
                read_only: *access == DiskAccess::ReadOnly,
            });
        }
        DiskAccess::Joined(files) => {
            let open = |access: &FileAccess| {
                Ok(JoinedFile {
                    file: next_file()?,
                    length: access.length,
                    read_only: access.read_only,
                })
            };
            let files = files.iter().map(open).collect::<Result<_, MachineError>>()?;
            let joined = JoinedFiles::new(files).map_err(|source| MachineError::JoinedFiles {
                serial: serial.to_owned(),
                source,
            })?;
            return Ok(Backing::Joined(joined));
        }
        DiskAccess::ReadOnlyImage => Image::open_read_only(Box::new(next_file()?)),
        DiskAccess::ReadOnlyPart(extent) => Image::open_read_only(Box::new(FilePart::new(next_file()?, *extent))),
        DiskAccess::CopyOnWrite {
            format,
            host_boot,
            read_only,
        } => {
            let (base, writes) = (Box::new(next_file()?), Box::new(next_file()?));
            let image = match format {
                BaseFormat::Detected => Image::open(base, writes, *host_boot),
                BaseFormat::Raw => Image::open_raw(base, writes, *host_boot),
            };
            image.map(|image| if *read_only { image.into_read_only() } else { image })
        }
    };
    image
        .map(|image| Backing::Image(Box::new(image)))
        .map_err(|source| MachineError::DiskImage {
            serial: serial.to_owned(),
            source,
        })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use nutshell_protocol::disk_serial;

    use super::*;

    fn config(disks: Vec<DiskAccess>) -> MachineConfig {
        let disks = (0..).zip(disks).map(|(slot, access)| DiskConfig {
            serial: disk_serial(slot),
            access,
        });
        let extent = Extent { offset: 0, length: 0 };
        MachineConfig {
            memory: 2 << 20,
            max_memory: 2 << 20,
            vcpus: 1,
            max_vcpus: 1,
            file_server: false,
            disks: disks.collect(),
            hotplug_disks: 0,
            kernel: extent,
        }
    }

    fn parse(disks: Vec<DiskAccess>, files: Vec<File>) -> Result<BootResources, String> {
        let null = || File::open("/dev/null").unwrap().into();
        let mut descriptors: Vec<OwnedFd> = (0..4).map(|_| null()).collect();
        descriptors.extend(files.into_iter().map(OwnedFd::from));
        let software = Software::Agent {
            board: BoardKind::Container,
            initramfs: Extent { offset: 0, length: 0 },
            kernel_arguments: String::new(),
        };
        BootResources::parse(config(disks), software, descriptors).map_err(|error| error.to_string())
    }

    fn file(size: u64, start: &[u8]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        file.write_all_at(start, 0).unwrap();
        file
    }

    #[test]
    fn each_disk_takes_the_descriptors_of_its_kind() {
        let copy_on_write = DiskAccess::CopyOnWrite {
            format: BaseFormat::Detected,
            host_boot: [1; 16],
            read_only: false,
        };
        let raw_copy_on_write = DiskAccess::CopyOnWrite {
            format: BaseFormat::Raw,
            host_boot: [1; 16],
            read_only: false,
        };
        let disks = vec![
            DiskAccess::ReadWrite,
            copy_on_write,
            raw_copy_on_write,
            DiskAccess::ReadOnlyImage,
            DiskAccess::Joined(vec![
                FileAccess {
                    length: 1024,
                    read_only: true,
                },
                FileAccess {
                    length: 512,
                    read_only: false,
                },
            ]),
            DiskAccess::ReadOnly,
        ];
        // A raw disk stays raw, even if the guest has written the magic number of another format to it.
        let files = || {
            vec![
                file(1024, b"QFI\xfb"),
                file(2048, b"base"),
                file(0, b""),
                file(4096, b"QFI\xfb"),
                file(0, b""),
                file(512, b"image"),
                file(2000, b"layer"),
                file(512, b"layer"),
                file(1536, b"QFI\xfb"),
            ]
        };

        let resources = parse(disks.clone(), files()).unwrap();

        let found = resources.disks.iter().map(|(_, disk)| match disk {
            Backing::File { file, read_only } => ("file", file.metadata().unwrap().len(), *read_only),
            Backing::Image(image) => ("image", image.size(), image.is_read_only()),
            Backing::Joined(_) => ("joined", disk.size().unwrap(), disk.is_read_only()),
        });
        assert!(found.eq([
            ("file", 1024, false),
            ("image", 2048, false),
            ("image", 4096, false),
            ("image", 512, true),
            ("joined", 1536, false),
            ("file", 1536, true),
        ]));
        let mut missing = files();
        missing.pop();
        let error = parse(disks, missing).unwrap_err();
        assert_eq!(error, "disk nutshell-5: its command has too few descriptors");
    }

    #[test]
    fn wrong_image_is_refused_with_disk_field_and_value() {
        let copy_on_write = DiskAccess::CopyOnWrite {
            format: BaseFormat::Detected,
            host_boot: [1; 16],
            read_only: false,
        };
        let empty = FileAccess {
            length: 0,
            read_only: true,
        };
        for (access, files, expected) in [
            (
                DiskAccess::Joined(vec![empty]),
                vec![file(512, b"")],
                "disk nutshell-1: file 1 has 0 bytes, which is not a positive multiple of 512",
            ),
            (
                DiskAccess::ReadOnlyImage,
                vec![file(72, b"QFI\xfb\0\0\0\x09")],
                "disk nutshell-1: qcow2 base image: version is 9, and only 2 and 3 are supported",
            ),
            (
                copy_on_write.clone(),
                vec![file(1000, b""), file(0, b"")],
                "disk nutshell-1: the size of the raw base image is 1000 bytes, not a multiple of 512: \
                 the file may be incomplete",
            ),
            (
                copy_on_write,
                vec![file(512, b""), file(100, b"")],
                "disk nutshell-1: copy-on-write file: its size is 100 bytes instead of 77824: it belongs to another \
                 base image or is incomplete, remove it to start again from the base image. The file is \
                 .nutshell-disk-writes… in the root of the container's snapshot",
            ),
        ] {
            let files = std::iter::once(file(512, b"")).chain(files).collect();
            assert_eq!(parse(vec![DiskAccess::ReadOnly, access], files).unwrap_err(), expected);
        }
    }
}
