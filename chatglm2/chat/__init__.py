"""What the terminal and the web pages share: conversations, one model for many chats, Markdown."""
