"""The verdict: is each method as accurate as LoRA, and is what is served as accurate as what was trained?"""
