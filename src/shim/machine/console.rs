//! Text that a guest may have written, made fit for logs and error messages.

/// How many lines are kept, counted from the end.
const MAX_LINES: usize = 24;

/// The last lines of `bytes` that are not blank, without control characters: a terminal that shows the log must not
/// obey the guest.
pub(super) fn printable_tail(bytes: &[u8]) -> String {
    let text: String = String::from_utf8_lossy(bytes)
        .chars()
        .filter(|character| !character.is_control() || *character == '\n')
        .collect();
    let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(MAX_LINES)..].join("\n")
}
