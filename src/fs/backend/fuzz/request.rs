//! FUSE requests (Linux, `include/uapi/linux/fuse.h`) from the bytes of an input.

use arbitrary::{Result, Unstructured};
use virtiofsd::fuse::{InHeader, Opcode, OutHeader};

/// A part of the body of a request.
#[derive(Debug, Clone, Copy)]
enum Field {
    /// A handle of an open file.
    Handle,
    Node,
    /// An offset or a length in a file, 64 bits.
    Position,
    /// An offset or a length in a file, 32 bits.
    Size,
    /// Any 32 bits, mostly few of them.
    Flags,
    /// The mode of a file.
    Mode,
    /// User or group.
    Owner,
    /// Flags of open(2).
    Open,
    /// The name of a file.
    Name,
    /// The name of an extended attribute.
    Attribute,
    /// The rest of the request.
    Data,
    /// 32 bits of zeroes.
    Zero,
}

use Field::{Attribute, Data, Flags, Handle, Mode, Name, Node, Open, Owner, Position, Size, Zero};

const READ: &[Field] = &[Handle, Position, Size, Flags, Position, Flags, Zero];
const RELEASE: &[Field] = &[Handle, Open, Flags, Position];
const SYNC: &[Field] = &[Handle, Flags, Zero];

/// The body of each operation.
const OPERATIONS: &[(Opcode, &[Field])] = &[
    (Opcode::Lookup, &[Name]),
    (Opcode::Forget, &[Position]),
    (Opcode::Getattr, &[Flags, Zero, Handle]),
    (
        Opcode::Setattr,
        &[
            Flags, Zero, Handle, Position, Position, Position, Position, Position, Size, Size, Size, Mode, Zero, Owner,
            Owner, Zero,
        ],
    ),
    (Opcode::Readlink, &[]),
    (Opcode::Symlink, &[Name, Name]),
    (Opcode::Mknod, &[Mode, Flags, Flags, Zero, Name]),
    (Opcode::Mkdir, &[Mode, Flags, Name]),
    (Opcode::Unlink, &[Name]),
    (Opcode::Rmdir, &[Name]),
    (Opcode::Rename, &[Node, Name, Name]),
    (Opcode::Link, &[Node, Name]),
    (Opcode::Open, &[Open, Flags]),
    (Opcode::Read, READ),
    (
        Opcode::Write,
        &[Handle, Position, Size, Flags, Position, Flags, Zero, Data],
    ),
    (Opcode::Statfs, &[]),
    (Opcode::Release, RELEASE),
    (Opcode::Fsync, SYNC),
    (Opcode::Setxattr, &[Size, Flags, Attribute, Data]),
    (Opcode::Getxattr, &[Size, Zero, Attribute]),
    (Opcode::Listxattr, &[Size, Zero]),
    (Opcode::Removexattr, &[Attribute]),
    (Opcode::Flush, &[Handle, Zero, Zero, Position]),
    (Opcode::Opendir, &[Open, Zero]),
    (Opcode::Readdir, READ),
    (Opcode::Releasedir, RELEASE),
    (Opcode::Fsyncdir, SYNC),
    (Opcode::Access, &[Flags, Zero]),
    (Opcode::Create, &[Open, Mode, Flags, Flags, Name]),
    (Opcode::Interrupt, &[Position]),
    (Opcode::BatchForget, &[Flags, Zero, Node, Position, Node, Position]),
    (Opcode::Fallocate, &[Handle, Position, Position, Flags, Zero]),
    (Opcode::Readdirplus, READ),
    (Opcode::Rename2, &[Node, Flags, Zero, Name, Name]),
    (Opcode::Lseek, &[Handle, Position, Flags, Zero]),
    (
        Opcode::CopyFileRange,
        &[Handle, Position, Node, Handle, Position, Position, Position],
    ),
    (Opcode::Syncfs, &[Position]),
    (Opcode::Destroy, &[]),
];

/// The names of files that exist, of some that do not, and of some that are invalid.
const NAMES: &[&str] = &[
    "a",
    "b",
    "0",
    "rootfs",
    "file",
    "bin",
    "link",
    "x",
    "y",
    "..",
    ".",
    "",
    "a/b",
    "../../secret",
];

const ATTRIBUTES: &[&str] = &[
    "user.a",
    "security.capability",
    "system.posix_acl_access",
    "trusted.a",
    "user.",
    "",
];

/// Node id of the tree's root.
const ROOT: u64 = 1;

/// What a guest has learned from replies.
#[derive(Debug)]
pub(super) struct Session {
    nodes: Vec<u64>,
    handles: Vec<u64>,
}

impl Default for Session {
    fn default() -> Self {
        Self {
            nodes: vec![ROOT],
            handles: vec![0],
        }
    }
}

/// Makes the size in the body of a FUSE_SETXATTR that of its value, unless it is odd: otherwise nearly no request would
/// reach the file system.
fn correct_size_of_value(body: &mut [u8]) {
    const FIXED_FIELDS: usize = 8;
    let name_end = body.iter().skip(FIXED_FIELDS).position(|byte| *byte == 0);
    if let Some(name) = name_end
        && body[0] & 1 == 0
    {
        let size = u32::try_from(body.len() - FIXED_FIELDS - name - 1).unwrap();
        body[..4].copy_from_slice(&size.to_le_bytes());
    }
}

impl Session {
    /// FUSE_INIT of version 7.38, or anything.
    pub(super) fn init(&self, input: &mut Unstructured<'_>) -> Result<Vec<u8>> {
        let flags = if input.ratio(3_u8, 4)? {
            1 << 3 | 1 << 5 | 1 << 23 | 1 << 27 | 1 << 28 | 1 << 30
        } else {
            input.arbitrary()?
        };
        let minor = if input.ratio(7_u8, 8)? { 38 } else { input.arbitrary()? };
        let mut body = [7, minor, 0, flags].map(u32::to_le_bytes).concat();
        body.resize(64, 0);
        Ok(frame(Opcode::Init as u32, 0, [0; 2], &body))
    }

    /// Any request.
    pub(super) fn request(&self, input: &mut Unstructured<'_>) -> Result<Vec<u8>> {
        let (operation, fields) = input.choose(OPERATIONS)?;
        let node = self.node(input)?;
        let mut body = Vec::new();
        for field in *fields {
            self.add(&mut body, *field, input)?;
        }
        if matches!(operation, Opcode::Setxattr) {
            correct_size_of_value(&mut body);
        }
        if input.ratio(1_u8, 16)? {
            body.truncate(input.int_in_range(0..=body.len())?);
        }
        let owners = [owner(input)?, owner(input)?];
        let opcode = if input.ratio(31_u8, 32)? {
            *operation as u32
        } else {
            u32::from(input.arbitrary::<u8>()?)
        };
        let mut frame = frame(opcode, node, owners, &body);
        if input.ratio(1_u8, 32)? {
            frame[..4].copy_from_slice(&input.arbitrary::<u32>()?.to_le_bytes());
        }
        if input.ratio(1_u8, 32)? {
            frame.truncate(input.int_in_range(0..=frame.len())?);
        }
        Ok(frame)
    }

    /// Checks a reply and keeps the node id or handle in it.
    pub(super) fn take(&mut self, request: &[u8], reply: &[u8]) {
        let header = size_of::<OutHeader>();
        if reply.is_empty() {
            return;
        }
        let field = |bytes: &[u8], offset: usize| u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap());
        assert!(reply.len() >= header && request.len() >= size_of::<InHeader>());
        assert_eq!(field(reply, 0) as usize, reply.len());
        assert_eq!(reply[8..16], request[8..16], "the reply to another request");
        let error = field(reply, 4).cast_signed();
        assert!((-4095..=0).contains(&error), "{error}");
        if error != 0 {
            assert_eq!(reply.len(), header);
            return;
        }
        let id = |offset: usize| {
            let bytes = reply.get(header + offset..header + offset + 8)?;
            Some(u64::from_le_bytes(bytes.try_into().unwrap()))
        };
        let opcode = field(request, 4);
        let is_one_of = |operations: &[Opcode]| operations.iter().any(|operation| *operation as u32 == opcode);
        let makes_node = [
            Opcode::Lookup,
            Opcode::Symlink,
            Opcode::Mknod,
            Opcode::Mkdir,
            Opcode::Link,
            Opcode::Create,
        ];
        if is_one_of(&makes_node) {
            self.nodes.extend(id(0));
        }
        if is_one_of(&[Opcode::Open, Opcode::Opendir]) {
            self.handles.extend(id(0));
        }
        if is_one_of(&[Opcode::Create]) {
            // After `struct fuse_entry_out`.
            self.handles.extend(id(128));
        }
    }

    fn node(&self, input: &mut Unstructured<'_>) -> Result<u64> {
        match input.int_in_range(0..=31_u8)? {
            0 => input.arbitrary(),
            1 => Ok(*input.choose(&self.nodes)? ^ 1 << input.int_in_range(0..=63_u8)?),
            _ => Ok(*input.choose(&self.nodes)?),
        }
    }

    fn add(&self, body: &mut Vec<u8>, field: Field, input: &mut Unstructured<'_>) -> Result<()> {
        match field {
            Handle if input.ratio(1_u8, 32)? => body.extend(input.arbitrary::<u64>()?.to_le_bytes()),
            Handle => body.extend(input.choose(&self.handles)?.to_le_bytes()),
            Node => body.extend(self.node(input)?.to_le_bytes()),
            Position => body.extend(position(input)?.to_le_bytes()),
            Size => body.extend(position(input)?.to_le_bytes()[..4].to_vec()),
            Flags if input.ratio(1_u8, 16)? => body.extend(input.arbitrary::<u32>()?.to_le_bytes()),
            Flags if input.arbitrary()? => body.extend((1_u32 << input.int_in_range(0..=31_u8)?).to_le_bytes()),
            Flags => body.extend(u32::from(input.arbitrary::<u8>()?).to_le_bytes()),
            Mode => {
                let kind = *input.choose(&[libc::S_IFREG, libc::S_IFIFO, libc::S_IFCHR, libc::S_IFBLK, 0])?;
                body.extend((kind | u32::from(input.arbitrary::<u16>()? & 0o7777)).to_le_bytes());
            }
            Owner => body.extend(owner(input)?.to_le_bytes()),
            Open => {
                let access = u32::from(input.int_in_range(0..=3_u8)?);
                let other = if input.arbitrary()? {
                    0
                } else {
                    input.arbitrary::<u32>()?
                };
                body.extend((access | other).to_le_bytes());
            }
            Name => {
                body.extend(input.choose(NAMES)?.as_bytes());
                body.extend((!input.ratio(1_u8, 64)?).then_some(0));
            }
            Attribute => {
                body.extend(input.choose(ATTRIBUTES)?.as_bytes());
                body.push(0);
            }
            Data => {
                let count = usize::from(input.arbitrary::<u16>()? & 0x1fff);
                body.resize(body.len() + count, b'd');
            }
            Zero => body.extend([0; 4]),
        }
        Ok(())
    }
}

fn owner(input: &mut Unstructured<'_>) -> Result<u32> {
    Ok(*input.choose(&[0, 0, 0, 1000, u32::MAX])?)
}

fn position(input: &mut Unstructured<'_>) -> Result<u64> {
    Ok(match input.int_in_range(0..=7_u8)? {
        0 => input.arbitrary()?,
        1 | 2 => input.arbitrary::<u16>()?.into(),
        _ => input.arbitrary::<u8>()?.into(),
    })
}

/// A request with its header.
fn frame(opcode: u32, node: u64, [uid, gid]: [u32; 2], body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(size_of::<InHeader>() + body.len()).unwrap();
    let mut frame = [length, opcode].map(u32::to_le_bytes).concat();
    frame.extend([77, node].map(u64::to_le_bytes).concat());
    frame.extend([uid, gid, 1, 0].map(u32::to_le_bytes).concat());
    frame.extend(body);
    frame
}
