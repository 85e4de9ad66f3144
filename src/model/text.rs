//! The text half of a model: tokenizer, chat template, vocabulary, limits. Shared by every caller; never on a device.
//!
//!     Prompt::Chat   messages --template--> text ─┐
//!     Prompt::Raw                           text ─┴--tokenizer--> tokens, with the beginning token in front
//!     Prompt::Tokens                                              tokens, checked
//!
//! The text of control tokens counts as those tokens wherever it stands in a prompt, inside a user's message too. That
//! is what `transformers` and vLLM do, and templates need it. A caller who passes on text of strangers has to take such
//! marks out.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::base::{Error, Kind, Result};
use crate::model::Vocabulary;
use crate::model::files::ModelFiles;
use crate::model::grammar::Grammars;
use crate::model::spec::DecoderSpec;
use crate::model::template::ChatTemplate;
use crate::model::tokenizer::Tokenizer;
use crate::model::tools::ToolFormat;
use crate::task::{Message, Prompt, TextInput, Tools};

/// Tokenizer, template and limits of one model.
pub struct TextModel {
    tokenizer: Tokenizer,
    template: Template,
    grammars: Arc<Grammars>,
    context: u32,
    /// Ids below this can be computed: rows of the embedding that have a token.
    tokens: u32,
    /// A text of more bytes cannot fit into the context, however well it is tokenised.
    longest_text: usize,
    /// As `vocabulary`, with markers of tool calls printed that are control tokens; if there are such.
    with_markers: Option<Arc<Vocabulary>>,
}

enum Template {
    Ready(Box<Chat>),
    /// The model has one that cannot be used; raw prompts still work.
    Broken(Error),
    None,
}

/// How the model talks.
struct Chat {
    template: ChatTemplate,
    /// What conversations with tools are rendered with, where a model has a template of its own for them.
    for_tools: Option<ChatTemplate>,
    format: ToolFormat,
}

impl Template {
    fn ready(template: ChatTemplate, for_tools: Option<ChatTemplate>, tokenizer: &Tokenizer) -> Self {
        let format = ToolFormat::of(for_tools.as_ref().unwrap_or(&template), |text| tokenizer.control(text));
        Self::Ready(Box::new(Chat { template, for_tools, format }))
    }
}

impl Chat {
    fn render(&self, messages: &[Message], variables: &Map<String, Value>, tools: Option<&Tools>) -> Result<String> {
        let (messages, shown) = self.format.conversation(messages, tools);
        let with_tools = shown.is_some() || messages.iter().any(|message| message.tool_calls.is_some());
        let template = self.for_tools.as_ref().filter(|_| with_tools).unwrap_or(&self.template);
        let Some(shown) = shown else { return template.render(&messages, variables) };
        let mut variables = variables.clone();
        variables.insert("tools".to_owned(), shown);
        template.render(&messages, &variables)
    }
}

impl TextModel {
    /// Opens the text half of a GGUF file or of a safetensors folder (`tokenizer.json`, `tokenizer_config.json`).
    ///
    /// # Errors
    /// `ModelUnavailable` or `Unsupported`, with the file and what to do.
    pub fn open(path: &Path) -> Result<Self> {
        Self::of(&ModelFiles::open(path)?)
    }

    /// The text half of an open model. Nothing of the files is needed afterwards.
    ///
    /// # Errors
    /// As [`TextModel::open`].
    pub fn of(files: &ModelFiles) -> Result<Self> {
        let spec = DecoderSpec::read(files)?;
        let tokenizer = Tokenizer::read(files)?;
        let template = match ChatTemplate::source(files)? {
            Some(source) => match ChatTemplate::compile(&source, tokenizer.names()) {
                Ok(template) => {
                    // One that cannot be compiled is left out: the model can do without.
                    let for_tools = ChatTemplate::source_for_tools(files)?;
                    let for_tools = for_tools.map(|source| ChatTemplate::compile(&source, tokenizer.names()));
                    Template::ready(template, for_tools.and_then(Result::ok), &tokenizer)
                }
                Err(error) => {
                    tracing::warn!(model = %files.path().display(), %error, "this model can only be used with raw prompts");
                    Template::Broken(error)
                }
            },
            None if tokenizer.control("<|im_start|>").and(tokenizer.control("<|im_end|>")).is_some() => {
                Template::ready(ChatTemplate::chatml()?, None, &tokenizer)
            }
            None => Template::None,
        };
        let with_markers = match &template {
            Template::Ready(chat) if !chat.format.markers().is_empty() => {
                Some(Arc::new(tokenizer.vocabulary().printing(chat.format.markers())))
            }
            _ => None,
        };
        let vocabulary = tokenizer.vocabulary();
        let longest_piece = (0..vocabulary.len() as u32).map(|token| vocabulary.piece(token).len()).max();
        // Control tokens print nothing, but their text is in the prompt.
        let longest_piece = longest_piece.unwrap_or(0).max(tokenizer.longest_special());
        Ok(Self {
            tokens: vocabulary.len().min(spec.vocab) as u32,
            longest_text: longest_piece.saturating_mul(spec.context as usize),
            context: spec.context,
            grammars: grammars(&tokenizer),
            tokenizer,
            template,
            with_markers,
        })
    }

    /// A text half without files, for the simulated device: every byte is a token, conversations are ChatML.
    ///
    /// # Errors
    /// None in practice: the built-in template compiles.
    pub fn bytes(vocabulary: Arc<Vocabulary>, context: u32) -> Result<Self> {
        let tokenizer = Tokenizer::bytes(vocabulary);
        Ok(Self {
            tokens: 256,
            longest_text: context as usize,
            context,
            grammars: grammars(&tokenizer),
            template: Template::ready(ChatTemplate::chatml()?, None, &tokenizer),
            tokenizer,
            with_markers: None,
        })
    }

    /// Bytes behind tokens, end tokens.
    pub fn vocabulary(&self) -> &Arc<Vocabulary> {
        self.tokenizer.vocabulary()
    }

    /// Grammars over its tokens.
    pub fn grammars(&self) -> &Arc<Grammars> {
        &self.grammars
    }

    /// The longest sequence the model was made for.
    pub fn context(&self) -> u32 {
        self.context
    }

    /// Whether the model takes conversations. Without a template it takes raw text and tokens only.
    pub fn has_template(&self) -> bool {
        matches!(self.template, Template::Ready(_))
    }

    /// How the model is told of tools and how it calls them; a model without a template does not.
    pub fn tool_format(&self) -> Option<&ToolFormat> {
        match &self.template {
            Template::Ready(chat) => Some(&chat.format),
            Template::Broken(_) | Template::None => None,
        }
    }

    /// What tokens print in an answer that may hold calls of tools, if it is not what they print elsewhere.
    pub fn vocabulary_with_markers(&self) -> Option<&Arc<Vocabulary>> {
        self.with_markers.as_ref()
    }

    /// Text to tokens. With `special`, the text of control tokens (`<|im_end|>`) becomes those tokens. No beginning
    /// token is put in front.
    ///
    /// # Errors
    /// `ContextLength` for texts that cannot fit into the context in any case.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let mut tokens = Vec::new();
        self.append(text, special, &mut tokens)?;
        Ok(tokens)
    }

    /// A prompt in any form to the tokens the model reads: chat through the model's template (with the generation
    /// prompt added), raw text, tokens as they are. Text begins with the beginning-of-text token where the tokenizer
    /// wants one and the template or the caller has not put it there.
    ///
    /// # Errors
    /// `BadInput` when the model takes no conversations, when its template refuses this one, when the prompt is empty,
    /// or when a token id is outside the vocabulary; `ContextLength` for texts that cannot fit in any case.
    pub fn prompt_tokens(&self, prompt: &Prompt) -> Result<Vec<u32>> {
        self.tokens_of(prompt, None)
    }

    /// As [`TextModel::prompt_tokens`], with the tools that the model is offered.
    ///
    /// # Errors
    /// As there.
    pub fn input_tokens(&self, input: &TextInput) -> Result<Vec<u32>> {
        self.tokens_of(&input.prompt, input.tools.as_deref())
    }

    fn tokens_of(&self, prompt: &Prompt, tools: Option<&Tools>) -> Result<Vec<u32>> {
        let tokens = match prompt {
            Prompt::Chat { messages, template_kwargs } => {
                let chat = match &self.template {
                    Template::Ready(chat) => chat,
                    Template::Broken(error) => return Err(error.clone()),
                    Template::None => {
                        return Err(Error::bad_field(
                            "messages",
                            "This model has no chat template; send `prompt` (with `raw` set, where that exists) instead of `messages`.",
                        ));
                    }
                };
                self.text_tokens(&chat.render(messages, template_kwargs, tools)?)?
            }
            Prompt::Raw(text) => self.text_tokens(text)?,
            Prompt::Tokens(tokens) => {
                if let Some((index, &token)) = tokens.iter().enumerate().find(|&(_, &token)| token >= self.tokens) {
                    return Err(Error::bad_field(
                        format!("prompt.{index}"),
                        format!("Token {token} is outside the vocabulary of {} tokens.", self.tokens),
                    ));
                }
                tokens.clone()
            }
        };
        if tokens.is_empty() {
            return Err(Error::bad_field("prompt", "The prompt is empty; send at least one token of text."));
        }
        Ok(tokens)
    }

    fn text_tokens(&self, text: &str) -> Result<Vec<u32>> {
        let mut tokens = Vec::with_capacity(text.len().min(self.longest_text) / 3 + 1);
        tokens.extend(self.tokenizer.begin());
        self.append(text, true, &mut tokens)?;
        if let [first, second, ..] = tokens[..]
            && first == second
            && self.tokenizer.begin() == Some(first)
        {
            tokens.remove(0);
        }
        Ok(tokens)
    }

    fn append(&self, text: &str, special: bool, tokens: &mut Vec<u32>) -> Result<()> {
        if text.len() > self.longest_text {
            return Err(Error::new(
                Kind::ContextLength,
                format!(
                    "The prompt is {} bytes long, more than {} tokens can hold, which is the context window; shorten it.",
                    text.len(),
                    self.context
                ),
            ));
        }
        self.tokenizer.encode(text, special, tokens)?;
        // Some hubs' tokenizers know tokens that the model has no row for.
        if let Some(token) = tokens.iter().find(|&&token| token >= self.tokens) {
            return Err(Error::bad_input(format!(
                "The text holds token {token}, which the model has no embedding for; its tokenizer has more tokens than it."
            )));
        }
        Ok(())
    }
}

fn grammars(tokenizer: &Tokenizer) -> Arc<Grammars> {
    let control = tokenizer.controls().map(|(text, token)| (text.to_owned(), token)).collect();
    Arc::new(Grammars::new(tokenizer.vocabulary().clone(), control))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::kernel::Dtype;
    use crate::model::tests_support::{GgufFile, demo_model};
    use crate::task::Role;

    const TOKENS: [&str; 12] =
        ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "a", "b", "c", "Ċ", "user", "assistant", "u", "s"];

    /// A model whose tokenizer knows single letters, two roles and four control tokens; `rows` of embedding, context 8.
    fn file(rows: u64, tokens: [&str; 12]) -> GgufFile {
        GgufFile::new()
            .text("general.architecture", "llama")
            .u32("llama.block_count", 1)
            .u32("llama.context_length", 8)
            .u32("llama.embedding_length", 4)
            .u32("llama.feed_forward_length", 4)
            .u32("llama.attention.head_count", 1)
            .f32("llama.attention.layer_norm_rms_epsilon", 1e-5)
            .tensor("token_embd.weight", Dtype::F32, &[4, rows], vec![0; 16 * rows as usize])
            .text("tokenizer.ggml.model", "gpt2")
            .text("tokenizer.ggml.pre", "llama-bpe")
            .texts("tokenizer.ggml.tokens", tokens)
            .i32s("tokenizer.ggml.token_type", (0..12).map(|id| if id < 4 { 3 } else { 1 }))
            .texts("tokenizer.ggml.merges", Vec::<String>::new())
            .u32("tokenizer.ggml.bos_token_id", 0)
            .u32("tokenizer.ggml.eos_token_id", 1)
    }

    fn open(file: GgufFile) -> TextModel {
        let folder = tempfile::tempdir().unwrap();
        TextModel::open(&file.write(folder.path())).unwrap()
    }

    fn model(rows: u64) -> TextModel {
        open(file(rows, TOKENS))
    }

    fn with_template(source: &str) -> TextModel {
        open(file(12, TOKENS).text("tokenizer.chat_template", source))
    }

    fn chat(messages: &[(Role, &str)]) -> Prompt {
        let messages = messages.iter().map(|&(role, text)| Message::new(role, text)).collect();
        Prompt::Chat { messages, template_kwargs: Map::new() }
    }

    fn raw(text: &str) -> Prompt {
        Prompt::Raw(text.to_owned())
    }

    #[test]
    fn text_begins_with_the_beginning_token_once() {
        let template = "{{ bos_token }}{{ messages[0].content }}";
        let twice = with_template(template);
        assert_eq!(twice.prompt_tokens(&chat(&[(Role::User, "ab")])).unwrap(), [0, 4, 5]);
        let without = with_template("{{ messages[0].content }}");
        assert_eq!(without.prompt_tokens(&chat(&[(Role::User, "ab")])).unwrap(), [0, 4, 5]);
        assert_eq!(without.prompt_tokens(&raw("c")).unwrap(), [0, 6]);
        assert_eq!(without.prompt_tokens(&raw("<s>c")).unwrap(), [0, 6]);
        assert_eq!(without.prompt_tokens(&raw("")).unwrap(), [0]);
        assert_eq!(without.encode("<s>c", true).unwrap(), [0, 6]);
        assert_eq!(without.prompt_tokens(&Prompt::Tokens(vec![6, 4])).unwrap(), [6, 4]);
    }

    #[test]
    fn chatml_is_the_template_where_only_its_tokens_are_there() {
        let model = model(12);
        assert!(model.has_template());
        let tokens = model.prompt_tokens(&chat(&[(Role::User, "a")])).unwrap();
        assert_eq!(tokens, [0, 2, 8, 7, 4, 3, 7, 2, 9, 7]);
    }

    #[test]
    fn a_model_without_template_says_what_to_do() {
        let renamed = TOKENS.map(|token| if token == "<|im_start|>" { "<x>" } else { token });
        let model = open(file(12, renamed).flag("tokenizer.ggml.add_bos_token", false));
        assert!(!model.has_template());
        let error = model.prompt_tokens(&chat(&[(Role::User, "a")])).unwrap_err();
        assert_eq!((error.kind(), error.param()), (Kind::BadInput, Some("messages")));
        assert!(error.message().contains("send `prompt`"), "{error}");
        let error = model.prompt_tokens(&raw("")).unwrap_err();
        assert!(error.message().contains("empty"), "{error}");
        assert!(model.prompt_tokens(&Prompt::Tokens(vec![])).unwrap_err().message().contains("empty"));
    }

    #[test]
    fn a_template_that_cannot_be_compiled_costs_conversations_only() {
        let model = with_template("{% for %}");
        let error = model.prompt_tokens(&chat(&[(Role::User, "a")])).unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported);
        assert_eq!(model.prompt_tokens(&raw("a")).unwrap(), [0, 4]);
    }

    #[test]
    fn tokens_without_a_row_are_refused() {
        let model = model(9);
        let error = model.prompt_tokens(&Prompt::Tokens(vec![4, 9])).unwrap_err();
        assert_eq!(error.param(), Some("prompt.1"));
        assert!(error.message().contains("Token 9 is outside the vocabulary of 9"), "{error}");
        assert_eq!(model.prompt_tokens(&raw("us")).unwrap_err().kind(), Kind::BadInput);
    }

    #[test]
    fn what_cannot_fit_is_not_even_tokenised() {
        let model = model(12);
        // The longest special token has 12 bytes.
        assert_eq!(model.encode(&"a".repeat(8 * 12), true).unwrap().len(), 96);
        let error = model.prompt_tokens(&raw(&"a".repeat(8 * 12 + 1))).unwrap_err();
        assert_eq!(error.kind(), Kind::ContextLength);
        assert!(error.message().contains("97 bytes") && error.message().contains("8 tokens"), "{error}");
    }

    #[test]
    fn template_variables_reach_the_template() {
        let source = "{{ 'a' if enable_thinking else 'b' }}";
        let model = with_template(source);
        let prompt = |on: bool| {
            let template_kwargs = json!({"enable_thinking": on}).as_object().unwrap().clone();
            Prompt::Chat { messages: vec![Message::new(Role::User, "x")], template_kwargs }
        };
        assert_eq!(model.prompt_tokens(&prompt(true)).unwrap(), [0, 4]);
        assert_eq!(model.prompt_tokens(&prompt(false)).unwrap(), [0, 5]);
    }

    #[test]
    fn without_a_file_bytes_are_tokens() {
        let vocabulary = Arc::new(Vocabulary::new((0..=255u8).map(|byte| vec![byte]).chain([vec![]]), vec![256]));
        let model = TextModel::bytes(vocabulary, 64).unwrap();
        assert_eq!(model.prompt_tokens(&raw("a{{é")).unwrap(), [97, 123, 123, 0xC3, 0xA9]);
        let text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n";
        let tokens = model.prompt_tokens(&chat(&[(Role::User, "Hi")])).unwrap();
        assert_eq!(tokens, text.bytes().map(u32::from).collect::<Vec<_>>());
        assert!(model.prompt_tokens(&Prompt::Tokens(vec![256])).is_err());
    }

    #[test]
    fn the_demo_model_reads_a_conversation() {
        let Some(path) = demo_model() else { return };
        let model = TextModel::open(&path).unwrap();
        assert_eq!((model.context(), model.vocabulary().len()), (8192, 49_152));
        let tokens = model.prompt_tokens(&chat(&[(Role::System, "Be brief."), (Role::User, "Hi")])).unwrap();
        let text: Vec<u8> = tokens.iter().flat_map(|&token| model.vocabulary().piece(token).to_vec()).collect();
        assert_eq!(String::from_utf8(text).unwrap(), "system\nBe brief.\nuser\nHi\nassistant\n");
        assert_eq!((tokens[0], tokens.iter().filter(|&&token| token == 1).count()), (1, 3));
    }
}
