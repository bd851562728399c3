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

/// The first `max` characters of `text`, in one line, with control characters escaped.
pub(crate) fn printable_line(text: &str, max: usize) -> String {
    let mut line = String::new();
    for (index, character) in text.chars().enumerate() {
        if index == max {
            line.push('…');
            break;
        }
        if character.is_control() {
            line.extend(character.escape_debug());
        } else {
            line.push(character);
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_is_clipped_and_its_control_characters_escaped() {
        assert_eq!(printable_line("exec: \"é\"", 20), "exec: \"é\"");
        assert_eq!(printable_line("a\n\x1b[2J", 20), "a\\n\\u{1b}[2J");
        assert_eq!(printable_line("abcdef", 3), "abc…");
    }

    #[test]
    fn tail_has_the_last_lines_without_blank_ones_and_control_characters() {
        let mut console: String = (0..100).map(|line| format!("line {line}\r\n\n")).collect();
        console.push_str("\x1b[31mred\x07");

        let tail = printable_tail(console.as_bytes());

        let lines: Vec<_> = tail.lines().collect();
        assert_eq!(lines.len(), MAX_LINES);
        assert_eq!(lines[0], "line 77");
        assert_eq!(lines[MAX_LINES - 1], "[31mred");
    }
}
