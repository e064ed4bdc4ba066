"""The gateway: an OpenAI-compatible HTTP door to the pipelines, with any number of instances.

- ``settings``         what can be set
- ``api_errors``       errors in OpenAI's shape
- ``request_fields``   single fields of a request, checked with clear words
- ``requests``         whole requests, from bytes to frozen values
- ``options``          from a request to sampling options (pure)
- ``tokenizer``        text to token ids and back, chat templates
- ``detokenizer``      token by token to text, correct across UTF-8 borders (pure)
- ``stop_strings``     stop strings across token borders (pure)
- ``choice``           one answer growing token by token (pure)
- ``replies``          answers in OpenAI's shapes (pure)
- ``model_files``      fetching the tokenizer's files from a worker
- ``cluster``          the scheduler's state, and the model that follows it
- ``preparation``      from a request to prompts, options and the reply's shape
- ``inbox``            putting one sequence's tokens in order (pure)
- ``mailbox``          where a request's tokens wait, and for how long
- ``sequences``        the life of sequences: submit, tokens, failure, cancel
- ``request_body``     reading a body within its limits
- ``exchange``         one HTTP answer: stream or whole, and a client that hangs up
- ``access_log``       request ids, one log line a request, the last net for errors
- ``app``              the routes
- ``listening``        the socket
- ``server``           everything together, and its end
"""
