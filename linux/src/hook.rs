//! The standard streams of an OCI hook (OCI runtime spec, "POSIX-platform Hooks").
//!
//! They are files in memory and not pipes, so that a hook cannot block the caller if it does not read its input, or if
//! it leaves a child behind that keeps its output open.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};

use rustix::fs::MemfdFlags;

/// The maximum number of bytes of standard output, and of standard error, in the error of a failed hook.
const OUTPUT_LIMIT: u64 = 1024;

/// Creates a memfd that contains `text` and is positioned at its start.
///
/// # Errors
///
/// The errors of memfd_create(2) and write(2).
pub fn memory_file(text: &str) -> io::Result<File> {
    let mut file = File::from(rustix::fs::memfd_create("hook", MemfdFlags::CLOEXEC)?);
    file.write_all(text.as_bytes())?;
    file.seek(SeekFrom::Start(0))?;
    Ok(file)
}

/// Returns the text that a hook wrote to a [`memory_file`], trimmed: at most the first 1024 bytes. Invalid UTF-8 is
/// replaced.
///
/// # Errors
///
/// The errors of lseek(2) and read(2).
pub fn output(mut file: File) -> io::Result<String> {
    let mut output = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.take(OUTPUT_LIMIT).read_to_end(&mut output)?;
    Ok(String::from_utf8_lossy(&output).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_file_is_read_from_its_start() {
        let mut text = String::new();
        memory_file("{}").unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "{}");
    }

    #[test]
    fn output_is_trimmed_and_limited() {
        let mut file = memory_file("").unwrap();
        file.write_all(b"no network\n").unwrap();
        assert_eq!(output(file).unwrap(), "no network");

        let long = "x".repeat(2000);
        assert_eq!(output(memory_file(&long).unwrap()).unwrap().len(), 1024);
    }
}
