"""Text and messages to ids, and back.

tokenizer      text <-> ids                      chat_template  messages -> text
message_forms  messages as a template reads them  sandbox       where templates run
token_healing  the prompt's last token, chosen again
"""
