//! The identity of a virtual machine: its instance id and its hostname.

use std::{os::unix::ffi::OsStrExt, path::Path};

use sha2::{Digest, Sha256};

/// In bytes. A UUID has 36, but the UID of a pod is any text in an annotation.
const MAX_INSTANCE_ID_LENGTH: usize = 128;
/// In bytes (Linux, `__NEW_UTS_LEN`).
const MAX_HOSTNAME_LENGTH: usize = 64;

/// Why a machine cannot have this instance id or hostname.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(in crate::shim) enum IdentityError {
    #[error(
        "instance id {0:?}: it must have 1 to {MAX_INSTANCE_ID_LENGTH} ASCII letters, digits, '-', '.' or '_', and \
         start with a letter or digit"
    )]
    InstanceId(String),
    #[error(
        "hostname {0:?}: it must have 1 to {MAX_HOSTNAME_LENGTH} ASCII letters, digits, '-', '.' or '_', and start \
         with a letter or digit"
    )]
    Hostname(String),
}

/// The identity that a machine gets if the user's metadata does not contain another one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::shim) struct Identity {
    pub(in crate::shim) instance_id: InstanceId,
    pub(in crate::shim) hostname: Hostname,
}

/// cloud-init configures a guest again when its instance id changes. So a machine whose root persists has the same id
/// in each pod that runs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::shim) struct InstanceId(String);

impl InstanceId {
    /// The id of a machine with a persistent root: a UUID that depends on these names only.
    pub(in crate::shim) fn of_persistent_root(namespace: &str, pod: &str, container: &str) -> Self {
        Self(format_uuid(derive_uuid(
            format!("{namespace}/{pod}/{container}").as_bytes(),
        )))
    }

    /// The id of a machine outside of Kubernetes: a UUID that depends only on the host and on the path of the bundle.
    pub(in crate::shim) fn of_bundle(host: &str, bundle: &Path) -> Self {
        let text = [host.trim().as_bytes(), bundle.as_os_str().as_bytes()].join(&b'/');
        Self(format_uuid(derive_uuid(&text)))
    }

    /// The id of a machine whose root ends with its pod: the pod's UID. The UID of a static pod is not a UUID: the
    /// kubelet makes it from a hash.
    pub(in crate::shim) fn of_pod(uid: &str) -> Self {
        Self::parse(uid).unwrap_or_else(|_| Self(format_uuid(derive_uuid(uid.as_bytes()))))
    }

    /// Accepts the characters of [`Hostname::parse`], because the id also becomes part of files that guests parse.
    pub(in crate::shim) fn parse(text: &str) -> Result<Self, IdentityError> {
        if is_plain(text, MAX_INSTANCE_ID_LENGTH) {
            Ok(Self(text.to_owned()))
        } else {
            Err(IdentityError::InstanceId(text.to_owned()))
        }
    }

    pub(in crate::shim) fn as_str(&self) -> &str {
        &self.0
    }

    /// The UUID that the guest reads from SMBIOS, in the byte order of RFC 9562: the id, or a UUID derived from an id
    /// that is not a UUID.
    pub(in crate::shim) fn uuid(&self) -> [u8; 16] {
        parse_uuid(&self.0).unwrap_or_else(|| derive_uuid(self.0.as_bytes()))
    }
}

/// A hostname for the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::shim) struct Hostname(String);

impl Hostname {
    /// Accepts the characters that containerd and Kubernetes use in names. It is stricter than Linux, because the name
    /// becomes part of files that guests parse.
    pub(in crate::shim) fn parse(text: &str) -> Result<Self, IdentityError> {
        if is_plain(text, MAX_HOSTNAME_LENGTH) {
            Ok(Self(text.to_owned()))
        } else {
            Err(IdentityError::Hostname(text.to_owned()))
        }
    }

    pub(in crate::shim) fn as_str(&self) -> &str {
        &self.0
    }
}

fn is_plain(text: &str, max_length: usize) -> bool {
    text.len() <= max_length
        && text.starts_with(|first: char| first.is_ascii_alphanumeric())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
}

/// A UUID of version 8 from the first bytes of a SHA-256 hash (RFC 9562, section 5.8 and appendix B.2).
fn derive_uuid(text: &[u8]) -> [u8; 16] {
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&Sha256::digest(text)[..16]);
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

fn format_uuid(uuid: [u8; 16]) -> String {
    let digits = format!("{:032x}", u128::from_be_bytes(uuid));
    let [a, b, c, d, e] = [0..8, 8..12, 12..16, 16..20, 20..32].map(|range| &digits[range]);
    format!("{a}-{b}-{c}-{d}-{e}")
}

/// Parses a UUID with or without hyphens.
fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let has_hyphens = text.len() == 36 && [8, 13, 18, 23].iter().all(|&index| text.as_bytes()[index] == b'-');
    let digits = if has_hyphens {
        text.replace('-', "")
    } else {
        text.to_owned()
    };
    if digits.len() != 32 || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    Some(u128::from_str_radix(&digits, 16).ok()?.to_be_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_of_persistent_root_is_a_uuid_of_version_8() {
        // printf default/db-0/vm | sha256sum
        let id = InstanceId::of_persistent_root("default", "db-0", "vm");
        assert_eq!(id.as_str(), "53850853-79a7-8f82-9b76-0389ff7be563");
        assert_eq!(id, InstanceId::of_persistent_root("default", "db-0", "vm"));
        for (namespace, pod, container) in [
            ("other", "db-0", "vm"),
            ("default", "db-1", "vm"),
            ("default", "db-0", "v"),
        ] {
            let other = InstanceId::of_persistent_root(namespace, pod, container);
            assert_ne!(other, id);
            assert_eq!(other.as_str().as_bytes()[14], b'8', "{other:?}");
            assert!(b"89ab".contains(&other.as_str().as_bytes()[19]), "{other:?}");
        }
    }

    #[test]
    fn id_of_a_bundle_depends_on_host_and_path_only() {
        let of = |host: &str, path: &str| InstanceId::of_bundle(host, Path::new(path));
        let id = of("0123\n", "/run/default/vm1");
        assert_eq!(id, of("0123", "/run/default/vm1"));
        assert_eq!(id.as_str().as_bytes()[14], b'8');
        for other in [
            of("4567", "/run/default/vm1"),
            of("0123", "/run/default/vm2"),
            of("0123", "/run/moby/vm1"),
        ] {
            assert_ne!(other, id);
        }
    }

    #[test]
    fn id_of_a_pod_is_its_uid_or_derived_from_it() {
        assert_eq!(InstanceId::of_pod("i-1234").as_str(), "i-1234");
        let derived = InstanceId::of_pod("a\nruncmd: [x]");
        assert_eq!(derived, InstanceId::of_pod("a\nruncmd: [x]"));
        assert!(is_plain(derived.as_str(), 36), "{derived:?}");
    }

    #[test]
    fn uuid_is_the_id_or_derived_from_it() {
        const BYTES: [u8; 16] = 0x0011_2233_4455_4677_8899_aabb_ccdd_eeff_u128.to_be_bytes();
        for (id, expected) in [
            ("00112233-4455-4677-8899-aabbccddeeff", Some(BYTES)),
            ("00112233-4455-4677-8899-AABBCCDDEEFF", Some(BYTES)),
            // The UIDs of static pods have this form.
            ("00112233445546778899aabbccddeeff", Some(BYTES)),
            ("0011223-34455-4677-8899-aabbccddeeff", None),
            ("i-1234", None),
        ] {
            let uuid = InstanceId::parse(id).unwrap().uuid();
            assert_eq!(uuid, expected.unwrap_or_else(|| derive_uuid(id.as_bytes())), "{id}");
        }
        let persistent = InstanceId::of_persistent_root("default", "db-0", "vm");
        assert_eq!(format_uuid(persistent.uuid()), persistent.as_str());
    }

    #[test]
    fn only_plain_names_are_instance_ids_and_hostnames() {
        let longest_hostname = "h".repeat(64);
        let longest_id = "i".repeat(128);
        for text in [
            "a",
            "db-0",
            "db-0.db.default.svc",
            "under_score",
            "0",
            longest_hostname.as_str(),
        ] {
            assert_eq!(Hostname::parse(text).unwrap().as_str(), text);
            assert_eq!(InstanceId::parse(text).unwrap().as_str(), text);
        }
        assert!(InstanceId::parse(&longest_id).is_ok());
        assert!(Hostname::parse(&"h".repeat(65)).is_err());
        assert!(InstanceId::parse(&"i".repeat(129)).is_err());
        for text in [
            "",
            "-a",
            ".a",
            "_a",
            "a b",
            "a\n",
            "a\nruncmd: [x]",
            "a\0",
            "a\"",
            "a'",
            "a\\",
            "a:",
            "a#",
            "ä",
            "a\u{2028}",
            "{a}",
            "\u{7f}",
        ] {
            assert_eq!(Hostname::parse(text), Err(IdentityError::Hostname(text.to_owned())));
            assert_eq!(InstanceId::parse(text), Err(IdentityError::InstanceId(text.to_owned())));
        }
        let error = Hostname::parse("a\nb").unwrap_err().to_string();
        assert!(
            error.starts_with(r#"hostname "a\nb": it must have 1 to 64 ASCII letters"#),
            "{error}"
        );
        let error = InstanceId::parse("").unwrap_err().to_string();
        assert!(
            error.starts_with(r#"instance id "": it must have 1 to 128 ASCII letters"#),
            "{error}"
        );
    }
}
