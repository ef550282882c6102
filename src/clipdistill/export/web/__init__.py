"""`--to web`: a model in a browser without a server: towers, tokenizer, and a page that searches pictures."""
