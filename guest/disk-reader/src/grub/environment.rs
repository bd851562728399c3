//! GRUB's environment block, `grubenv` (GNU GRUB manual, "The GRUB environment block").

const SIGNATURE: &str = "# GRUB Environment Block\n";

/// The largest number of variables in a block, which has 1024 bytes as a rule.
const MAX_VARIABLES: usize = 256;

/// Returns the variables in a block. A file that is no block has none.
pub(super) fn parse(text: &str) -> Vec<(String, String)> {
    let Some(text) = text.strip_prefix(SIGNATURE) else {
        return Vec::new();
    };
    let mut variables = Vec::new();
    let mut characters = text.chars();
    while variables.len() < MAX_VARIABLES {
        // A backslash escapes a backslash or the end of a line in a value.
        let mut line = String::new();
        let is_complete = loop {
            match characters.next() {
                Some('\\') => line.extend(characters.next()),
                Some('\n') => break true,
                Some(character) => line.push(character),
                None => break false,
            }
        };
        if let Some((name, value)) = line.split_once('=')
            && !line.starts_with('#')
        {
            variables.push((name.to_owned(), value.to_owned()));
        }
        if !is_complete {
            break;
        }
    }
    variables
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_of_a_block_are_read() {
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let text = format!("{SIGNATURE}saved_entry=a>b\nkernelopts=root=UUID=1 ro \na=b\\\\c\\\nd\n#########");
        let expected = [
            pair("saved_entry", "a>b"),
            pair("kernelopts", "root=UUID=1 ro "),
            pair("a", "b\\c\nd"),
        ];
        assert_eq!(parse(&text), expected);
        assert_eq!(parse(&format!("{SIGNATURE}a=b")), [pair("a", "b")]);
        assert!(parse("saved_entry=a\n").is_empty());
        assert_eq!(
            parse(&format!("{SIGNATURE}{}", "a=b\n".repeat(1000))).len(),
            MAX_VARIABLES
        );
    }
}
