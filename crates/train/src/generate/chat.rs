//! Chat templates: how a conversation is written for an instruct model.
//!
//! A template is Jinja, rendered as transformers does: blocks trimmed, `messages`,
//! `add_generation_prompt` and the special tokens defined, `raise_exception` to refuse. Not
//! supported, and refused where a template cannot do without: tools, documents, images, the
//! `{% generation %}` block, and the clock (`strftime_now` is undefined, as before transformers
//! 4.49, so templates that ask whether it is take their fixed date).

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, Error, ErrorKind, context};
use serde::Serialize;
use serde_json::Serializer;
use serde_json::ser::{Formatter, PrettyFormatter};

/// Steps that a template may take; those of real models take a few thousand.
const FUEL: u64 = 1 << 20;

/// A chat template that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {problem}", path.display())]
pub struct ChatError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong.
    pub problem: String,
}

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

/// A model's chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    path: PathBuf,
    source: String,
    /// `bos_token` and the like, by name.
    special: serde_json::Map<String, serde_json::Value>,
}

impl ChatTemplate {
    /// The template in `dir`: `chat_template.jinja`, or the one that `tokenizer_config.json` (of
    /// several, the one called `default`) or `chat_template.json` holds.
    ///
    /// # Errors
    /// If there is none, or its file is damaged.
    pub fn load(dir: &Path) -> Result<Self, ChatError> {
        let config_path = dir.join("tokenizer_config.json");
        let config = read_json(&config_path)?;
        let mut special = serde_json::Map::new();
        for (key, value) in config.as_object().into_iter().flatten() {
            // Either the token or an object that describes it.
            let token = value.as_str().or_else(|| value["content"].as_str());
            if let (true, Some(token)) = (key.ends_with("_token"), token) {
                special.insert(key.clone(), token.into());
            }
        }
        let jinja = dir.join("chat_template.jinja");
        let json_path = dir.join("chat_template.json");
        let (path, source) = if jinja.is_file() {
            let source = std::fs::read_to_string(&jinja).map_err(|error| ChatError {
                path: jinja.clone(),
                problem: format!("cannot be read: {error}"),
            })?;
            (jinja, Some(source))
        } else if let Some(source) = template_of(&config) {
            (config_path, Some(source))
        } else {
            let json = read_json(&json_path)?;
            (json_path, template_of(&json))
        };
        let Some(source) = source else {
            return Err(ChatError {
                path: dir.to_path_buf(),
                problem: "has no chat template (chat_template.jinja, or chat_template in \
                          tokenizer_config.json): is this an instruct model?"
                    .into(),
            });
        };
        Ok(Self {
            path,
            source,
            special,
        })
    }

    /// The text of `messages`, up to where the assistant begins to answer.
    ///
    /// # Errors
    /// If the template uses what is not supported, refuses the conversation, or takes too long.
    pub fn render(&self, messages: &[Message]) -> Result<String, ChatError> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(FUEL));
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function(
            "raise_exception",
            |problem: String| -> Result<Value, Error> {
                Err(Error::new(ErrorKind::InvalidOperation, problem))
            },
        );
        environment.add_filter("tojson", to_json);
        let special = Value::from_serialize(&self.special);
        let rendered = environment
            .template_from_str(&self.source)
            .and_then(|template| {
                template.render(context! {
                    messages => messages,
                    add_generation_prompt => true,
                    ..special
                })
            });
        rendered.map_err(|error| ChatError {
            path: self.path.clone(),
            problem: format!("the chat template cannot be rendered: {error}"),
        })
    }
}

/// `tojson` as transformers has it: Python's `json.dumps`, which writes a space after commas and
/// colons and, unlike Jinja's own, leaves `<` and `>` alone.
fn to_json(value: Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    options.assert_all_used()?;
    let mut out = vec![];
    let written = match indent {
        None => value.serialize(&mut Serializer::with_formatter(&mut out, Python)),
        Some(width) => {
            let spaces = " ".repeat(width.min(16));
            let pretty = PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut out, pretty))
        }
    };
    let refuse = |problem: String| Error::new(ErrorKind::BadSerialization, problem);
    written.map_err(|error| refuse(error.to_string()))?;
    let text = String::from_utf8(out).map_err(|error| refuse(error.to_string()))?;
    Ok(Value::from(text))
}

/// JSON on one line with Python's spaces.
struct Python;

impl Formatter for Python {
    fn begin_array_value<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        out.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.begin_array_value(out, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b": ")
    }
}

/// The template that a JSON file holds: a text, or several with names.
fn template_of(json: &serde_json::Value) -> Option<String> {
    let template = &json["chat_template"];
    let mut several = template.as_array().into_iter().flatten();
    let default = several.find(|one| one["name"] == "default");
    let text = template.as_str().or_else(|| default?["template"].as_str());
    text.map(ToString::to_string)
}

/// A JSON file's content; null if there is none.
fn read_json(path: &Path) -> Result<serde_json::Value, ChatError> {
    let refuse = |problem: String| ChatError {
        path: path.to_path_buf(),
        problem,
    };
    if !path.is_file() {
        return Ok(serde_json::Value::Null);
    }
    let bytes = std::fs::read(path).map_err(|error| refuse(format!("cannot be read: {error}")))?;
    serde_json::from_slice(&bytes).map_err(|error| refuse(format!("not JSON: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder whose tokenizer has this template.
    fn folder(template: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let config = serde_json::json!({
            "bos_token": {"content": "<s>"},
            "eos_token": "</s>",
            "chat_template": template,
        });
        std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        dir
    }

    fn message(role: &str, content: &str) -> Message {
        Message {
            role: role.into(),
            content: content.into(),
        }
    }

    fn render(template: &str, messages: &[Message]) -> Result<String, ChatError> {
        ChatTemplate::load(folder(template).path())?.render(messages)
    }

    /// The form of ChatML and of LLaMA, with what their templates use of Python.
    #[test]
    fn templates_render_as_in_transformers() {
        let chatml = "{%- set last = messages[-1] %}
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'].strip() + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role != 'system' %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}";
        let messages = [
            message("system", " Be brief. "),
            message("user", "Why <b>?"),
        ];
        assert_eq!(
            render(chatml, &messages).unwrap(),
            "<|im_start|>system\nBe brief.<|im_end|>\n\
             <|im_start|>user\nWhy <b>?<|im_end|>\n<|im_start|>assistant\n"
        );
        let llama = "{{- bos_token }}
{%- if not strftime_now is defined %}{% set date = '26 Jul 2024' %}{% endif %}
{% for message in messages %}
{{- '[' + message['role'] | upper + ' ' + date + '] ' + message['content'] | trim + eos_token }}
{% endfor %}
";
        assert_eq!(
            render(llama, &[message("user", " hi ")]).unwrap(),
            "<s>[USER 26 Jul 2024] hi</s>\n"
        );
    }

    /// What the templates of reasoning models do to find the last question.
    #[test]
    fn templates_may_walk_backwards_and_keep_state() {
        let template = r#"
{%- set ns = namespace(open=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.open and message.role == "user" and message.content is string and not(message.content.startswith('<tool') and message.content.endswith('>')) %}
        {%- set ns.open = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.reasoning_content is string %}{{ 'never' }}{% endif %}
    {%- if loop.index0 > ns.last or (loop.last and message.role != 'assistant') %}
        {{- '!' }}
    {%- endif %}
    {%- set content = message.content.split('</think>')[-1].lstrip('\n') %}
    {{- message.role[0] ~ ':' ~ content|tojson ~ '\n' }}
{%- endfor %}"#;
        let messages = [
            message("user", "one"),
            message("assistant", "<think>\nhm\n</think>\n\ntwo \"2\""),
            message("user", "three"),
            message("user", "<tool x>"),
        ];
        assert_eq!(
            render(template, &messages).unwrap(),
            "u:\"one\"\na:\"two \\\"2\\\"\"\nu:\"three\"\n!u:\"<tool x>\"\n"
        );
    }

    #[test]
    fn json_is_pythons() {
        let rendered = |template: &str| render(template, &[message("user", "<é>")]).unwrap();
        let list = "[{\"role\": \"user\", \"content\": \"<é>\"}]";
        assert_eq!(rendered("{{ messages | tojson }}"), list);
        assert_eq!(rendered("{{ [1, 2.5, none] | tojson }}"), "[1, 2.5, null]");
        assert_eq!(
            rendered("{{ {'a': [1]} | tojson(indent=2) }}"),
            "{\n  \"a\": [\n    1\n  ]\n}"
        );
    }

    #[test]
    fn what_a_template_refuses_is_told() {
        let refused = |template: &str| {
            let error = render(template, &[message("user", "x")]).unwrap_err();
            error.to_string()
        };
        assert!(
            refused("{{ raise_exception('roles must alternate') }}")
                .contains("roles must alternate")
        );
        assert!(refused("{% generation %}x{% endgeneration %}").contains("generation"));
        assert!(refused("{{ messages | no_such_filter }}").contains("no_such_filter"));
        // A template comes with the weights, so it may be anyone's.
        let endless =
            "{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}";
        assert!(refused(endless).contains("fuel"));
        let none = tempfile::tempdir().unwrap();
        let error = ChatTemplate::load(none.path()).unwrap_err().to_string();
        assert!(error.contains("no chat template"), "{error}");
    }

    #[test]
    fn of_several_templates_the_default_counts() {
        let dir = tempfile::tempdir().unwrap();
        let config = serde_json::json!({"chat_template": [
            {"name": "tool_use", "template": "tools"},
            {"name": "default", "template": "plain"},
        ]});
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write("tokenizer_config.json", &config.to_string());
        let render = || ChatTemplate::load(dir.path()).unwrap().render(&[]).unwrap();
        assert_eq!(render(), "plain");
        write("chat_template.jinja", "file");
        assert_eq!(render(), "file");
    }
}
