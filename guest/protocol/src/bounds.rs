//! Limits of lists and texts in messages. A list that is too long ends its deserialization before it occupies memory.

use std::{fmt, marker::PhantomData};

use serde::{
    Deserialize, Deserializer,
    de::{Error, SeqAccess, Visitor},
};

/// Deserializes a list of at most `MAX` items. For `#[serde(deserialize_with)]`.
pub(crate) fn list<'de, D, T, const MAX: usize>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    deserializer.deserialize_seq(ListVisitor::<T, MAX>(PhantomData))
}

/// Deserializes a text of at most `MAX` bytes. For `#[serde(deserialize_with)]`.
pub(crate) fn text<'de, D: Deserializer<'de>, const MAX: usize>(deserializer: D) -> Result<String, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text.len() > MAX {
        let expected = format!("a text of at most {MAX} bytes");
        return Err(D::Error::invalid_length(text.len(), &expected.as_str()));
    }
    Ok(text)
}

struct ListVisitor<T, const MAX: usize>(PhantomData<T>);

impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for ListVisitor<T, MAX> {
    type Value = Vec<T>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "a list of at most {MAX} items")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Vec<T>, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            if list.len() == MAX {
                return Err(A::Error::invalid_length(MAX + 1, &self));
            }
            list.push(item);
        }
        Ok(list)
    }
}

#[cfg(test)]
mod tests {
    use serde::Serialize;

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Message(#[serde(deserialize_with = "list::<_, _, 3>")] Vec<u32>);

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct TextMessage(#[serde(deserialize_with = "text::<_, 3>")] String);

    #[test]
    fn text_beyond_its_limit_is_refused() {
        let decode = |text: &str| {
            let bytes = postcard::to_stdvec(&TextMessage(text.to_owned())).unwrap();
            postcard::from_bytes::<TextMessage>(&bytes)
        };
        assert_eq!(decode("abc").unwrap(), TextMessage("abc".to_owned()));
        assert!(decode("abcd").is_err());
    }

    #[test]
    fn list_beyond_its_limit_is_refused() {
        let decode = |message: &Message| {
            let bytes = postcard::to_stdvec(message).unwrap();
            postcard::from_bytes::<Message>(&bytes)
        };
        let longest = Message(vec![1, 2, 3]);
        assert_eq!(decode(&longest).unwrap(), longest);
        assert!(decode(&Message(vec![1, 2, 3, 4])).is_err());
    }
}
