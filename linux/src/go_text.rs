//! Error texts and signal names as in Go's standard library. runc is written in Go, so these are the texts that users
//! know and search for.

use std::io;

/// Formats an error as Go's `syscall.Errno` does: without the number that Rust's standard library appends, and
/// beginning with a lowercase letter.
#[must_use]
pub fn error_text(error: &io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or(&text);
    let mut characters = text.chars();
    match characters.next() {
        Some(first) => first.to_lowercase().chain(characters).collect(),
        None => String::new(),
    }
}

/// Names a signal as Go's `syscall.Signal` does. For signals that rarely end a process, the name is only `signal` and
/// the number.
#[must_use]
pub fn signal_name(signal: i32) -> String {
    match signal {
        libc::SIGHUP => "hangup".to_owned(),
        libc::SIGINT => "interrupt".to_owned(),
        libc::SIGABRT => "aborted".to_owned(),
        libc::SIGKILL => "killed".to_owned(),
        libc::SIGSEGV => "segmentation fault".to_owned(),
        libc::SIGTERM => "terminated".to_owned(),
        other => format!("signal {other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_has_no_number_and_begins_with_a_lowercase_letter() {
        let error = io::Error::from_raw_os_error(libc::ENOENT);
        assert_eq!(error_text(&error), "no such file or directory");
    }

    #[test]
    fn signal_that_often_ends_a_process_has_gos_name() {
        assert_eq!(signal_name(libc::SIGKILL), "killed");
        assert_eq!(signal_name(libc::SIGUSR1), "signal 10");
    }
}
