if __name__ != "secateur.pipeline":  # found by its folder: it would be a second copy of every class
    raise ImportError(
        "pipeline is imported as secateur.pipeline. A deployment that names it was made by an earlier Secateur: "
        "make it anew with `secateur deploy RUN_FILE`"
    )
