//! The files of a tokenizer, taken from one folder to another as they are.

use std::fs::File;
use std::io::{Seek, copy};
use std::path::Path;

use super::template_sources::TemplateSources;
use crate::checkpoint::is_there;
use crate::error::{Error, Result};

/// Files that are a tokenizer's, in folders of transformers.
pub const TOKENIZER_FILES: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
];

/// Files of a tokenizer and chat templates in place of its own. They are open: that their folder is
/// moved or removed no longer matters.
#[derive(Debug, Default)]
pub struct TokenizerFiles {
    files: Vec<(&'static str, File)>,
    templates: Option<TemplateSources>,
}

impl TokenizerFiles {
    /// The files of a tokenizer that `folder` has.
    ///
    /// # Errors
    /// `Io` when one cannot be opened.
    pub fn of_folder(folder: &Path) -> Result<Self> {
        let names = TOKENIZER_FILES.into_iter().filter(|name| {
            let path = folder.join(name);
            is_there(&path) && !path.is_dir()
        });
        let open = |name: &'static str| {
            let path = folder.join(name);
            Ok((name, File::open(&path).map_err(|e| Error::io("open", &path, e))?))
        };
        let files = names.map(open).collect::<Result<_>>()?;
        Ok(TokenizerFiles { files, templates: TemplateSources::of_several_files(folder)? })
    }

    /// The files with these chat templates, if any, in place of their own.
    pub fn with_templates(self, templates: Option<TemplateSources>) -> Self {
        TokenizerFiles { templates: templates.or(self.templates), ..self }
    }

    /// Bytes of the files.
    pub fn bytes(&self) -> u64 {
        let bytes = |file: &File| file.metadata().map_or(0, |metadata| metadata.len());
        self.files.iter().map(|(_, file)| bytes(file)).sum()
    }

    /// Writes them into `folder`.
    ///
    /// # Errors
    /// `Io` when the disk refuses.
    pub fn save(&self, folder: &Path) -> Result<()> {
        for (name, file) in &self.files {
            let (path, mut from) = (folder.join(name), file);
            let mut write = || {
                from.rewind()?;
                copy(&mut from, &mut File::create(&path)?)
            };
            write().map_err(|e| Error::io("write", &path, e))?;
        }
        self.templates.as_ref().map_or(Ok(()), |templates| templates.save(folder))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn write(folder: &Path, name: &str, text: &str) {
        fs::create_dir_all(folder.join(name).parent().unwrap()).unwrap();
        fs::write(folder.join(name), text).unwrap();
    }

    #[cfg(unix)] // elsewhere a file that is open may keep its folder
    #[test]
    fn files_are_what_they_were_when_they_were_opened() {
        let root = tempfile::tempdir().unwrap();
        let [from, to] = ["from", "to"].map(|name| root.path().join(name));
        fs::create_dir(&to).unwrap();
        let names = ["tokenizer.json", "merges.txt"];
        names.iter().for_each(|name| write(&from, name, name));
        write(&from, "adapter_model.safetensors", "");
        let files = TokenizerFiles::of_folder(&from).unwrap();
        fs::remove_dir_all(&from).unwrap();
        for _ in 0..2 {
            assert_eq!(files.bytes() as usize, names.concat().len());
            files.save(&to).unwrap();
            for name in names {
                assert_eq!(fs::read_to_string(to.join(name)).unwrap(), name);
            }
            assert_eq!(fs::read_dir(&to).unwrap().count(), names.len());
        }
    }

    #[test]
    fn other_templates_replace_those_of_the_files() {
        let root = tempfile::tempdir().unwrap();
        let [from, to] = ["from", "to"].map(|name| root.path().join(name));
        fs::create_dir(&to).unwrap();
        write(&from, "chat_template.jinja", "chat");
        write(&from, "additional_chat_templates/tool_use.jinja", "tools");
        let files = TokenizerFiles::of_folder(&from).unwrap();
        files.save(&to).unwrap();
        let both = TemplateSources { chat: "chat".into(), tool_use: Some("tools".into()) };
        assert_eq!(TemplateSources::of_adapter(&to).unwrap(), Some(both.clone()));
        let one = TemplateSources { chat: "other".into(), tool_use: None };
        let other = TemplateSources { chat: "other".into(), ..both };
        for templates in [one, other] {
            let files = TokenizerFiles::of_folder(&from).unwrap();
            files.with_templates(Some(templates.clone())).save(&to).unwrap();
            assert_eq!(TemplateSources::of_adapter(&to).unwrap(), Some(templates));
        }
    }
}
