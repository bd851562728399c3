//! Patterns of names (glob(7)), as in the `default` setting of systemd-boot.

/// Whether `name` matches `pattern` with `*`, `?` and `[...]`, without regard to ASCII case. Takes time proportional to
/// the product of the lengths at most: only the last `*` is tried again.
pub(crate) fn is_match(pattern: &str, name: &str) -> bool {
    let fold = |text: &str| -> Vec<char> { text.chars().map(|character| character.to_ascii_lowercase()).collect() };
    let (pattern, name) = (fold(pattern), fold(name));
    let (mut at, mut name_at) = (0, 0);
    // After the last star: its position, and the position in the name from which it is tried next.
    let mut retry: Option<(usize, usize)> = None;
    loop {
        if name_at == name.len() && pattern[at..].iter().all(|character| *character == '*') {
            return true;
        }
        if pattern.get(at) == Some(&'*') {
            retry = Some((at, name_at));
            at += 1;
            continue;
        }
        let length = name
            .get(name_at)
            .and_then(|character| match_one(&pattern[at..], *character));
        match (length, &mut retry) {
            (Some(length), _) => {
                at += length;
                name_at += 1;
            }
            (None, Some((star, next))) if *next < name.len() => {
                *next += 1;
                (at, name_at) = (*star + 1, *next);
            }
            (None, _) => return false,
        }
    }
}

/// Matches one character with the first element of `pattern`. Returns the length of the element if it matches.
fn match_one(pattern: &[char], character: char) -> Option<usize> {
    match pattern {
        ['?', ..] => Some(1),
        ['[', set @ ..] => match_set(set, character).map(|length| length + 1),
        ['\\', literal, ..] => (*literal == character).then_some(2),
        [literal, ..] => (*literal == character).then_some(1),
        [] => None,
    }
}

/// Matches a set, such as `a-z]` or `!xy]`.
fn match_set(set: &[char], character: char) -> Option<usize> {
    let is_negated = matches!(set, ['!' | '^', ..]);
    let first = usize::from(is_negated);
    // A bracket in the first place is a member.
    let end = set.iter().skip(first + 1).position(|member| *member == ']')? + first + 1;
    let mut members = &set[first..end];
    let mut is_member = false;
    while !members.is_empty() {
        members = match members {
            [from, '-', to, rest @ ..] => {
                is_member |= (*from..=*to).contains(&character);
                rest
            }
            [member, rest @ ..] => {
                is_member |= *member == character;
                rest
            }
            [] => members,
        };
    }
    (is_member != is_negated).then_some(end + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_names() {
        for (pattern, name, expected) in [
            ("arch", "arch", true),
            ("Arch*", "arch-6.1.conf", true),
            ("*-lts.conf", "arch-lts.conf", true),
            ("*-lts.conf", "arch-lts.conf.old", false),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("[a-c]x", "bx", true),
            ("[!a-c]x", "bx", false),
            ("[]]", "]", true),
            ("[a", "a", false),
            ("\\*", "*", true),
            ("\\*", "a", false),
            ("", "", true),
            ("", "a", false),
            ("*", "", true),
            ("a*b*c", "aXbXbXc", true),
            ("a*b*c", "aXbXbX", false),
        ] {
            assert_eq!(is_match(pattern, name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn pattern_with_many_stars_is_matched_quickly() {
        let name = "a".repeat(4096);
        let pattern = format!("{}b", "a*".repeat(2048));
        assert!(!is_match(&pattern, &name));
    }
}
