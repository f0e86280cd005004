//! The workspace's own files, and where in them something is found. Reads lines, not syntax: enough
//! for what is formatted by rustfmt, and easy to see through.

use std::{
    fmt::{self, Display},
    fs,
    path::{Path, PathBuf},
};

const CRATES: [&str; 5] = ["proto", "raft", "node", "client", "tests"];
/// Far fewer than there are; a scan that finds less has looked in the wrong place.
const SOURCES_MIN: usize = 100;

/// One file, by its path from the workspace's root.
#[derive(Debug, Clone)]
pub(super) struct Source {
    pub(super) path: String,
    pub(super) text: String,
}

/// A line that ought not to be.
#[derive(Debug)]
pub(super) struct Found {
    path: String,
    /// From 1; 0 is the whole file.
    pub(super) line: usize,
    text: String,
}

impl Source {
    pub(super) fn read(path: &str) -> Self {
        let text =
            fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
        Self {
            path: path.to_owned(),
            text,
        }
    }

    pub(super) fn is_in(&self, places: &[&str]) -> bool {
        places.iter().any(|place| self.path.starts_with(place))
    }

    /// A file that only tests are made of: a module that its parent declares under `#[cfg(test)]`.
    pub(super) fn is_test(&self) -> bool {
        let mut path = Path::new(&self.path);
        while let (Some(dir), Some(stem)) = (path.parent(), path.file_stem()) {
            let parents = [
                dir.join("mod.rs"),
                dir.join("lib.rs"),
                dir.with_extension("rs"),
            ];
            let declaration = format!("#[cfg(test)]\nmod {};", stem.to_string_lossy());
            if parents.iter().any(|parent| {
                fs::read_to_string(root().join(parent))
                    .is_ok_and(|text| text.contains(&declaration))
            }) {
                return true;
            }
            path = dir;
        }
        false
    }

    pub(super) fn whole(&self) -> Found {
        Found {
            path: self.path.clone(),
            line: 0,
            text: String::new(),
        }
    }

    /// In any line, comments too.
    pub(super) fn found_anywhere(&self, is_wrong: impl Fn(&str) -> bool) -> Vec<Found> {
        self.found_in(self.lines(), is_wrong)
    }

    /// In lines of code.
    pub(super) fn found(&self, is_wrong: impl Fn(&str) -> bool) -> Vec<Found> {
        self.found_in(self.code(), is_wrong)
    }

    /// In lines of code before the file's module of tests, which comes last.
    pub(super) fn found_outside_tests(&self, is_wrong: impl Fn(&str) -> bool) -> Vec<Found> {
        let tests = self
            .text
            .find("\n#[cfg(test)]\nmod tests {")
            .map_or(usize::MAX, |at| self.text[..at].lines().count());
        self.found_in(
            self.code().filter(move |(line, _)| *line <= tests),
            is_wrong,
        )
    }

    pub(super) fn found_in(
        &self,
        lines: impl IntoIterator<Item = (usize, String)>,
        is_wrong: impl Fn(&str) -> bool,
    ) -> Vec<Found> {
        let wrong = lines.into_iter().filter(|(_, text)| is_wrong(text));
        wrong
            .map(|(line, text)| Found {
                path: self.path.clone(),
                line,
                text: text.trim().to_owned(),
            })
            .collect()
    }

    /// Lines that name something of a crate.
    pub(super) fn uses_crate(&self, name: &str) -> Vec<Found> {
        let (path, import) = (format!("{name}::"), format!("use {name};"));
        self.found(|line| {
            line.match_indices(&path)
                .any(|(at, _)| !line[..at].ends_with(is_word))
                || line.contains(&import)
        })
    }

    /// The types that `use name::…;` brings in.
    pub(super) fn imports_of(&self, name: &str) -> Vec<String> {
        let uses = self.statements(|line| {
            line.starts_with(&format!("use {name}::"))
                || line.starts_with(&format!("pub use {name}::"))
        });
        let renamed = |item: &str| item.rsplit(" as ").next().unwrap_or(item).trim().to_owned();
        let items = uses.into_iter().flat_map(|(_, text)| {
            let path = text[text.find("::").map_or(0, |at| at + 2)..].replace("::", ",");
            path.split(['{', '}', ',', ';'])
                .map(renamed)
                .collect::<Vec<_>>()
        });
        items
            .filter(|item| item.starts_with(|first: char| first.is_uppercase()))
            .collect()
    }

    /// What is declared `pub` to everyone, each from its line to its body or end.
    pub(super) fn public_signatures(&self) -> Vec<(usize, String)> {
        self.statements(|line| {
            line.trim_start().starts_with("pub ") && !line.trim_start().starts_with("pub use")
        })
    }

    /// From a line that begins one to the first `;`, `{` at a line's end, or `,` of a field.
    fn statements(&self, begins: impl Fn(&str) -> bool) -> Vec<(usize, String)> {
        let code: Vec<(usize, String)> = self.code().collect();
        let starts = (0..code.len()).filter(|&at| begins(&code[at].1));
        let statements = starts.map(|start| {
            let is_import = code[start].1.contains("use ");
            let ends = |line: &str| {
                line.ends_with(';')
                    || !is_import
                        && (line.ends_with('{') || line.ends_with('}') || line.ends_with("},"))
            };
            let end = (start..code.len())
                .find(|&at| ends(code[at].1.trim_end()))
                .unwrap_or(code.len() - 1);
            (
                code[start].0,
                code[start..=end]
                    .iter()
                    .map(|(_, text)| text.as_str())
                    .collect::<Vec<_>>()
                    .join(" "),
            )
        });
        statements.collect()
    }

    fn lines(&self) -> impl Iterator<Item = (usize, String)> {
        self.text
            .lines()
            .enumerate()
            .map(|(index, line)| (index + 1, line.to_owned()))
    }

    fn code(&self) -> impl Iterator<Item = (usize, String)> {
        self.lines()
            .filter(|(_, line)| !line.trim_start().starts_with("//"))
    }
}

impl Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "  {}", self.path),
            line => write!(f, "  {}:{line}: {}", self.path, self.text),
        }
    }
}

/// cargo says it at run time too: a binary that was built in another checkout reads the one it runs
/// for.
pub(super) fn root() -> PathBuf {
    let own = std::env::var("CARGO_MANIFEST_DIR")
        .unwrap_or_else(|_| env!("CARGO_MANIFEST_DIR").to_owned());
    Path::new(&own)
        .parent()
        .expect("the tests are a member of the workspace")
        .to_owned()
}

/// All Rust files.
pub(super) fn sources() -> Vec<Source> {
    let sources: Vec<Source> = texts()
        .into_iter()
        .filter(|source| source.path.ends_with(".rs"))
        .collect();
    assert!(
        sources.len() > SOURCES_MIN,
        "only {} files in {}",
        sources.len(),
        root().display()
    );
    sources
}

/// All files of text: the root's own, the crates', deploy's and the tools'.
pub(super) fn texts() -> Vec<Source> {
    let mut texts = Vec::new();
    for entry in fs::read_dir(root()).expect("the workspace can be read") {
        let path = entry.expect("the workspace can be read").path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if path.is_file() && !["Cargo.lock", ".git"].contains(&name.as_str()) {
            texts.extend(text_of(&path));
        } else if CRATES
            .iter()
            .chain(&["deploy", ".ci"])
            .any(|dir| *dir == name)
        {
            collect(&path, &mut texts);
        }
    }
    texts.sort_by(|a, b| a.path.cmp(&b.path));
    texts
}

/// Whether a line has this word, and not only as a part of another.
pub(super) fn names(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        !line[..at].ends_with(is_word) && !line[at + word.len()..].starts_with(is_word)
    })
}

/// Fails with all that was found.
pub(super) fn none<T: Display>(rule: &str, found: impl IntoIterator<Item = T>) {
    let found: Vec<String> = found.into_iter().map(|found| found.to_string()).collect();
    assert!(found.is_empty(), "{rule}:\n{}", found.join("\n"));
}

fn is_word(letter: char) -> bool {
    letter.is_alphanumeric() || letter == '_'
}

fn collect(dir: &Path, texts: &mut Vec<Source>) {
    for entry in fs::read_dir(dir).expect("a crate can be read") {
        let path = entry.expect("a crate can be read").path();
        if path.is_dir() && !path.ends_with("target") {
            collect(&path, texts);
        } else {
            texts.extend(text_of(&path));
        }
    }
}

/// Nothing for what is no text.
fn text_of(path: &Path) -> Option<Source> {
    let text = fs::read_to_string(path).ok()?;
    Some(Source {
        path: path
            .strip_prefix(root())
            .ok()?
            .to_string_lossy()
            .into_owned(),
        text,
    })
}
