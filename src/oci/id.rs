//! Identifiers of containers and sandboxes.

use std::{fmt, str::FromStr};

/// Maximum length of an identifier in bytes (containerd `pkg/identifiers`: `maxLength`).
const MAX_LENGTH: usize = 76;

/// A valid identifier: ASCII letters, digits, `.`, `_` and `-`, with a letter or digit at both ends, at most 76 bytes.
/// It is always a single path component, never `.` or `..`.
///
/// This accepts every identifier of containerd (`pkg/identifiers`), and some with several separators in a row.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ContainerId(String);

/// Why a string is not a valid identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum IdError {
    #[error("identifier is empty")]
    Empty,
    #[error("identifier of {0} bytes is longer than {MAX_LENGTH} bytes")]
    TooLong(usize),
    #[error("identifier {0:?} must consist of letters and digits, with '.', '_' or '-' between them")]
    Malformed(String),
}

impl ContainerId {
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
        let is_alphanumeric = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
        let bytes = text.as_bytes();
        let is_allowed = bytes
            .iter()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'));
        if is_allowed && is_alphanumeric(bytes.first()) && is_alphanumeric(bytes.last()) {
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
    fn only_valid_identifiers_parse() {
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
