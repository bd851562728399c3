//! Identifiers of containers.

use std::{fmt, str::FromStr};

/// The most bytes that an identifier has (containerd `pkg/identifiers`: `maxLength`).
const MAX_LENGTH: usize = 76;

/// An identifier as containerd's `pkg/identifiers` allows it: groups of ASCII letters and digits
/// with one of `.`, `_`, `-` (or a run of `-`) between them, at most 76 bytes. So it is always a single
/// path component, never `.` or `..`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ContainerId(String);

/// Why a string is no identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum IdError {
    /// It has no bytes.
    #[error("identifier is empty")]
    Empty,
    /// It has too many bytes.
    #[error("identifier of {0} bytes is longer than {MAX_LENGTH}")]
    TooLong(usize),
    /// It has a character where none of its kind may be.
    #[error("identifier {0:?} must be letters and digits, with one of '.', '_', '-' between them")]
    Malformed(String),
}

impl ContainerId {
    /// The identifier's text.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ContainerId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        if text.is_empty() {
            return Err(IdError::Empty);
        }
        if text.len() > MAX_LENGTH {
            return Err(IdError::TooLong(text.len()));
        }
        let alphanumeric = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
        let bytes = text.as_bytes();
        let inner = bytes
            .iter()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'));
        if inner && alphanumeric(bytes.first()) && alphanumeric(bytes.last()) {
            Ok(Self(text.to_owned()))
        } else {
            Err(IdError::Malformed(text.to_owned()))
        }
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl AsRef<str> for ContainerId {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_of_containerd_parse_and_everything_else_does_not() {
        let longest = "a".repeat(MAX_LENGTH);
        let hash = "5".repeat(64);
        for good in ["a", "redis-1", "k8s.io", "a_b.c-d", "a--b", "A9", &hash, &longest] {
            assert_eq!(good.parse::<ContainerId>().unwrap().as_str(), good);
        }
        let too_long = "a".repeat(MAX_LENGTH + 1);
        for bad in [
            "", ".", "..", "a/b", "/a", "../a", "-a", "a-", ".a", "a.", "a b", "a\0", "ä", "a\n", &too_long,
        ] {
            assert!(bad.parse::<ContainerId>().is_err(), "{bad:?}");
        }
    }
}
