//! Command lines of kernels.

/// The largest length of a command line, in bytes. Linux on x86 uses 2047 (`COMMAND_LINE_SIZE` - 1).
pub const MAX_COMMAND_LINE: usize = 4096;

/// Returns `command_line` with single spaces between its arguments, and none at its ends.
///
/// Fails if it is too long or contains a character that is not printable ASCII. Such a character comes from a broken
/// file, and the host prints command lines.
pub(crate) fn clean(command_line: &str) -> Result<String, String> {
    let is_space = |character: char| character.is_ascii_whitespace() || character == '\0';
    let trimmed = command_line.trim_matches(is_space);
    let mut cleaned = String::new();
    let mut is_quoted = false;
    for character in trimmed.chars() {
        match character {
            // Spaces in quotes belong to an argument (`next_arg` in the kernel's lib/cmdline.c).
            '"' => is_quoted = !is_quoted,
            '\t' | '\n' | '\r' | ' ' if !is_quoted && cleaned.ends_with(' ') => continue,
            _ => {}
        }
        match character {
            '\t' | '\n' | '\r' => cleaned.push(' '),
            ' '..='~' => cleaned.push(character),
            _ => return Err(format!("the command line has the character {character:?}")),
        }
        if cleaned.len() > MAX_COMMAND_LINE {
            return Err(format!("the command line is longer than {MAX_COMMAND_LINE} bytes"));
        }
    }
    Ok(cleaned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_is_cleaned_or_refused() {
        for (command_line, expected) in [
            ("", Some("")),
            ("  ro \t quiet\n\0", Some("ro quiet")),
            ("a=\"b  c\"  d", Some("a=\"b  c\" d")),
            ("a\0b", None),
            ("a\x1b[31m", None),
            ("label=\u{e4}", None),
        ] {
            assert_eq!(clean(command_line).ok().as_deref(), expected, "{command_line:?}");
        }
        assert!(clean(&"x".repeat(MAX_COMMAND_LINE)).is_ok());
        assert!(clean(&"x".repeat(MAX_COMMAND_LINE + 1)).is_err());
    }
}
