//! Parses GRUB's shell language (GNU GRUB manual, "Writing full configuration files directly").

use std::rc::Rc;

/// How deep blocks and conditions may be nested. Generated files use four levels.
const MAX_DEPTH: usize = 32;

/// How many words and separators a file may have. A menu of a hundred entries has some ten thousand.
const MAX_TOKENS: usize = 64 << 10;

/// A word before the expansion of its variables.
pub(super) type Word = Vec<Segment>;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) content: Content,
    /// In quotes or after a backslash, so that spaces in it, or in the variable's value, do not end the word.
    pub(super) is_quoted: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Content {
    Text(String),
    Variable(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Statement {
    Command {
        words: Vec<Word>,
        /// The block after the words, as of `menuentry`.
        block: Option<Block>,
    },
    If {
        /// Conditions, each with its statements.
        arms: Vec<(Block, Block)>,
        otherwise: Block,
    },
    For {
        variable: Word,
        values: Vec<Word>,
        body: Block,
    },
    /// `while` or `until`, which generated files do not use. It is not executed.
    Loop,
    Function {
        name: Word,
        body: Block,
    },
}

pub(super) type Block = Rc<[Statement]>;

#[derive(Debug, PartialEq, Eq)]
enum Token {
    Word(Word),
    /// A semicolon or the end of a line.
    End,
    Open,
    Close,
}

/// Parses a file. An error names the line, except that of a file with too many words.
pub(super) fn parse(text: &str) -> Result<Block, String> {
    let mut parser = Parser {
        tokens: Lexer::new(text).tokens()?,
        at: 0,
        depth: 0,
    };
    let block = parser.block(&[])?;
    match parser.peek() {
        None => Ok(block),
        Some(_) => Err(parser.error("unexpected `}`")),
    }
}

struct Lexer<'t> {
    rest: std::iter::Peekable<std::str::Chars<'t>>,
    line: usize,
}

impl<'t> Lexer<'t> {
    fn new(text: &'t str) -> Self {
        Self {
            rest: text.chars().peekable(),
            line: 1,
        }
    }

    /// Returns the tokens with the numbers of their lines.
    fn tokens(mut self) -> Result<Vec<(usize, Token)>, String> {
        let mut tokens = Vec::new();
        while let Some(character) = self.rest.peek().copied() {
            let line = self.line;
            let token = match character {
                ' ' | '\t' | '\r' => {
                    self.next();
                    continue;
                }
                '#' => {
                    while self.rest.peek().is_some_and(|character| *character != '\n') {
                        self.next();
                    }
                    continue;
                }
                '\n' | ';' => {
                    self.next();
                    Token::End
                }
                '{' => {
                    self.next();
                    Token::Open
                }
                '}' => {
                    self.next();
                    Token::Close
                }
                _ => match self.word()? {
                    // A continued line.
                    word if word.is_empty() => continue,
                    word => Token::Word(word),
                },
            };
            // Empty lines and comments.
            if token == Token::End && matches!(tokens.last(), None | Some((_, Token::End))) {
                continue;
            }
            if tokens.len() == MAX_TOKENS {
                return Err(format!("the file has more than {MAX_TOKENS} words"));
            }
            tokens.push((line, token));
        }
        Ok(tokens)
    }

    fn next(&mut self) -> Option<char> {
        let next = self.rest.next();
        self.line += usize::from(next == Some('\n'));
        next
    }

    fn word(&mut self) -> Result<Word, String> {
        let mut word = Word::new();
        while let Some(character) = self.rest.peek().copied() {
            match character {
                ' ' | '\t' | '\r' | '\n' | ';' | '{' | '}' => break,
                '\'' => {
                    self.next();
                    self.single_quoted(&mut word)?;
                }
                '"' => {
                    self.next();
                    self.double_quoted(&mut word)?;
                }
                '$' => {
                    self.next();
                    self.variable(&mut word, false)?;
                }
                '\\' => {
                    self.next();
                    match self.next() {
                        // The line continues.
                        Some('\n') | None => {}
                        Some(character) => push(&mut word, character, true),
                    }
                }
                character => {
                    self.next();
                    push(&mut word, character, false);
                }
            }
        }
        Ok(word)
    }

    fn single_quoted(&mut self, word: &mut Word) -> Result<(), String> {
        let line = self.line;
        push_text(word, true);
        loop {
            match self.next() {
                Some('\'') => return Ok(()),
                Some(character) => push(word, character, true),
                None => return Err(format!("line {line}: the quote has no end")),
            }
        }
    }

    fn double_quoted(&mut self, word: &mut Word) -> Result<(), String> {
        let line = self.line;
        push_text(word, true);
        loop {
            match self.next() {
                Some('"') => return Ok(()),
                Some('$') => self.variable(word, true)?,
                Some('\\') => match self.next() {
                    Some('\n') | None => {}
                    Some(character @ ('$' | '"' | '\\')) => push(word, character, true),
                    Some(character) => {
                        push(word, '\\', true);
                        push(word, character, true);
                    }
                },
                Some(character) => push(word, character, true),
                None => return Err(format!("line {line}: the quote has no end")),
            }
        }
    }

    /// Reads the name of a variable after `$`. A dollar sign without a name stands for itself.
    fn variable(&mut self, word: &mut Word, is_quoted: bool) -> Result<(), String> {
        let line = self.line;
        let mut name = String::new();
        match self.rest.peek().copied() {
            Some('{') => {
                self.next();
                loop {
                    match self.next() {
                        Some('}') => break,
                        Some('\n') | None => return Err(format!("line {line}: a variable has no closing brace")),
                        Some(character) => name.push(character),
                    }
                }
            }
            Some(character) if character.is_ascii_digit() || "@#?*".contains(character) => {
                self.next();
                name.push(character);
            }
            _ => {
                let is_name = |character: &char| character.is_ascii_alphanumeric() || *character == '_';
                while let Some(character) = self.rest.peek().copied().filter(is_name) {
                    self.next();
                    name.push(character);
                }
            }
        }
        if name.is_empty() {
            push(word, '$', is_quoted);
        } else {
            let content = Content::Variable(name);
            word.push(Segment { content, is_quoted });
        }
        Ok(())
    }
}

fn push(word: &mut Word, character: char, is_quoted: bool) {
    if let Some(text) = push_text(word, is_quoted) {
        text.push(character);
    }
}

/// Returns the text at the end of `word`. Appends an empty one if there is none.
fn push_text(word: &mut Word, is_quoted: bool) -> Option<&mut String> {
    let is_open = |segment: &Segment| segment.is_quoted == is_quoted && matches!(segment.content, Content::Text(_));
    if !word.last().is_some_and(is_open) {
        let content = Content::Text(String::new());
        word.push(Segment { content, is_quoted });
    }
    match word.last_mut() {
        Some(Segment {
            content: Content::Text(text),
            ..
        }) => Some(text),
        _ => None,
    }
}

struct Parser {
    tokens: Vec<(usize, Token)>,
    at: usize,
    depth: usize,
}

impl Parser {
    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at).map(|(_, token)| token)
    }

    /// Returns the next token if it is a word that is a single text without quotes.
    fn keyword(&self) -> Option<&str> {
        match self.peek() {
            Some(Token::Word(word)) => plain(word),
            _ => None,
        }
    }

    fn error(&self, text: &str) -> String {
        let line = self
            .tokens
            .get(self.at)
            .or(self.tokens.last())
            .map_or(1, |(line, _)| *line);
        format!("line {line}: {text}")
    }

    fn expect_keyword(&mut self, keyword: &str) -> Result<(), String> {
        self.skip_ends();
        if self.keyword() != Some(keyword) {
            return Err(self.error(&format!("`{keyword}` is missing")));
        }
        self.at += 1;
        Ok(())
    }

    fn expect(&mut self, token: &Token, name: &str) -> Result<(), String> {
        if self.peek() != Some(token) {
            return Err(self.error(&format!("`{name}` is missing")));
        }
        self.at += 1;
        Ok(())
    }

    fn skip_ends(&mut self) {
        while self.peek() == Some(&Token::End) {
            self.at += 1;
        }
    }

    /// Parses statements up to one of `terminators`, a closing brace, or the end of the file.
    fn block(&mut self, terminators: &[&str]) -> Result<Block, String> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(self.error(&format!("blocks are nested more than {MAX_DEPTH} deep")));
        }
        let mut statements = Vec::new();
        loop {
            self.skip_ends();
            match self.peek() {
                None | Some(Token::Close) => break,
                Some(_) if self.keyword().is_some_and(|keyword| terminators.contains(&keyword)) => break,
                Some(_) => statements.push(self.statement()?),
            }
        }
        self.depth -= 1;
        Ok(statements.into())
    }

    fn statement(&mut self) -> Result<Statement, String> {
        match self.keyword() {
            Some("if") => self.condition(),
            Some("for") => self.for_loop(),
            Some("while" | "until") => {
                self.at += 1;
                self.block(&["do"])?;
                self.expect_keyword("do")?;
                self.block(&["done"])?;
                self.expect_keyword("done")?;
                Ok(Statement::Loop)
            }
            Some("function") => {
                self.at += 1;
                let name = self.next_word()?;
                self.skip_ends();
                let body = self.braces()?;
                Ok(Statement::Function { name, body })
            }
            _ => self.command(),
        }
    }

    fn condition(&mut self) -> Result<Statement, String> {
        let mut arms = Vec::new();
        // `if` or `elif`.
        while matches!(self.keyword(), Some("if" | "elif")) {
            self.at += 1;
            let condition = self.block(&["then"])?;
            self.expect_keyword("then")?;
            arms.push((condition, self.block(&["elif", "else", "fi"])?));
        }
        let mut otherwise: Block = Rc::from([]);
        if self.keyword() == Some("else") {
            self.at += 1;
            otherwise = self.block(&["fi"])?;
        }
        self.expect_keyword("fi")?;
        Ok(Statement::If { arms, otherwise })
    }

    fn for_loop(&mut self) -> Result<Statement, String> {
        self.at += 1;
        let variable = self.next_word()?;
        self.expect_keyword("in")?;
        let values = self.words();
        self.expect_keyword("do")?;
        let body = self.block(&["done"])?;
        self.expect_keyword("done")?;
        Ok(Statement::For { variable, values, body })
    }

    fn command(&mut self) -> Result<Statement, String> {
        let words = self.words();
        if words.is_empty() {
            return Err(self.error("a command is missing"));
        }
        let block = match self.peek() {
            Some(Token::Open) => Some(self.braces()?),
            _ => None,
        };
        Ok(Statement::Command { words, block })
    }

    fn braces(&mut self) -> Result<Block, String> {
        self.expect(&Token::Open, "{")?;
        let block = self.block(&[])?;
        self.expect(&Token::Close, "}")?;
        Ok(block)
    }

    fn words(&mut self) -> Vec<Word> {
        let mut words = Vec::new();
        while let Some((_, Token::Word(word))) = self.tokens.get_mut(self.at) {
            words.push(std::mem::take(word));
            self.at += 1;
        }
        words
    }

    fn next_word(&mut self) -> Result<Word, String> {
        match self.tokens.get_mut(self.at) {
            Some((_, Token::Word(word))) => {
                self.at += 1;
                Ok(std::mem::take(word))
            }
            _ => Err(self.error("a name is missing")),
        }
    }
}

fn plain(word: &[Segment]) -> Option<&str> {
    match word {
        [
            Segment {
                content: Content::Text(text),
                is_quoted: false,
            },
        ] => Some(text),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn script_that_is_not_closed_is_refused_with_its_line() {
        for (text, expected) in [
            ("echo 'a", "line 1: the quote has no end"),
            ("\n\necho \"a", "line 3: the quote has no end"),
            ("echo ${a", "line 1: a variable has no closing brace"),
            ("menuentry a {\n", "line 1: `}` is missing"),
            ("if true; then\necho", "line 2: `fi` is missing"),
            ("if true; fi", "line 1: `then` is missing"),
            ("}", "line 1: unexpected `}`"),
            ("function {", "line 1: a name is missing"),
            ("for a b", "line 1: `in` is missing"),
        ] {
            assert_eq!(parse(text), Err(expected.to_owned()), "{text}");
        }
    }

    #[test]
    fn deeply_nested_script_is_refused() {
        for text in [
            "if ".repeat(10_000),
            "menuentry a {".repeat(10_000),
            "function f {\n".repeat(40),
        ] {
            assert!(parse(&text).unwrap_err().contains("nested"), "{}", &text[..10]);
        }
    }

    #[test]
    fn long_script_is_refused() {
        let text = "a ".repeat(MAX_TOKENS + 1);
        assert!(parse(&text).unwrap_err().contains("more than"));
    }
}
